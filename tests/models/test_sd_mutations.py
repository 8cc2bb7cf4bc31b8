"""Every convention of the families around a UNet, broken one at a time: each must fail a parity
test."""

import jax
import pytest
from mutate import Mutation, apply
from sd_checks import check_latents, check_picture, check_prompt


UNET_FAMILY, SD, SDXL = "models.unet.model", "models.sd.family", "models.sdxl.family"
TIME_IDS = "models.sdxl.conditioning:time_ids"
CONTROL = "pipeline:ControlImage.resolve"
DISCRETE = "sampling.discrete"
NUMBERS = [
    Mutation(
        "crop after target", "latents sdxl-sizes", TIME_IDS, "*crop, *target", "*target, *crop"
    ),
    Mutation(
        "target before crop and original",
        "latents sdxl-sizes",
        TIME_IDS,
        "*original, *crop, *target",
        "*target, *crop, *original",
    ),
    Mutation(
        "width first",
        "latents sdxl-zeros",
        TIME_IDS,
        "height, settings.width",
        "width, settings.height",
    ),
    Mutation("crop from above", "latents sdxl-sizes", TIME_IDS, "*crop,", "*crop[::-1],"),
    Mutation("sizes of one sign", "latents sdxl-sizes", TIME_IDS, "if negative:", "if False:"),
    Mutation(
        "crop of one sign",
        "latents sdxl-sizes",
        TIME_IDS,
        "settings.negative_crop or crop",
        "crop",
    ),
    Mutation(
        "absent negative prompt is the empty text",
        "latents sdxl-zeros",
        f"{SDXL}:StableDiffusionXL.absent",
        "jax.tree.map(jnp.zeros_like, encoded)",
        "encoded",
    ),
    Mutation(
        "absent negative prompt is zeros",
        "latents sd21-rescale",
        f"{SD}:StableDiffusion.absent",
        "return encoded",
        "return 0 * encoded",
    ),
    Mutation(
        "first prompt to both encoders",
        "prompt sdxl-sizes",
        f"{SDXL}:StableDiffusionXL.tokenize",
        ".encode(prompt_2)",
        ".encode(prompt)",
    ),
    Mutation(
        "second prompt to both encoders",
        "prompt sdxl-sizes",
        f"{SDXL}:StableDiffusionXL.tokenize",
        ".encode(prompt)",
        ".encode(prompt_2)",
    ),
    Mutation(
        "second negative prompt unread",
        "latents sdxl-sizes",
        "pipeline:Pipeline.encode",
        "settings.negative_prompt, settings.negative_prompt_2",
        "settings.negative_prompt, None",
    ),
    Mutation(
        "negative prompt unread",
        "latents sd2-ddim",
        "pipeline:Pipeline.encode",
        'texts[0] or ""',
        '""',
    ),
    Mutation(
        "padding of the second tokenizer",
        "prompt sdxl-zeros",
        f"{SDXL}:StableDiffusionXL.tokenize",
        'tokenizers["tokenizer_2"]',
        'tokenizers["tokenizer"]',
    ),
    Mutation(
        "padding",
        "prompt sd2-ddim",
        "text.tokenizer:Tokenizer.encode",
        "self.pad_id",
        "len(self.backend.get_vocab()) - 1",
    ),
    Mutation(
        "offset of leading timesteps",
        "latents sdxl-zeros",
        f"{DISCRETE}:_timesteps",
        " + config.steps_offset",
        "",
    ),
    Mutation(
        "leading in place of trailing",
        "latents lightning-4",
        f"{UNET_FAMILY}:AbstractUNetFamily._scheduler",
        "settings.timestep_spacing,",
        "None,",
    ),
    Mutation(
        "scale of the noise at the start",
        "latents lightning-4",
        f"{DISCRETE}:discrete_schedule",
        "sigma[0] if noise_alone else 1.0",
        "1.0",
    ),
    Mutation(
        "scale of the noise at a leading start",
        "latents sdxl-zeros",
        f"{DISCRETE}:discrete_schedule",
        'grid.levels == "real" and spacing != "leading"',
        'grid.levels == "real"',
    ),
    Mutation(
        "DDIM to no noise",
        "latents sd2-ddim",
        f"{DISCRETE}:discrete_schedule",
        "config.set_alpha_to_one is False",
        "False",
    ),
    Mutation(
        "signal at the last level",
        "latents sd21-zero-snr",
        f"{DISCRETE}:alphas_cumprod",
        "if config.rescale_betas_zero_snr",
        "if False",
    ),
    Mutation(
        "control from the step before",
        "latents sdxl-control",
        CONTROL,
        "if i / steps >= self.start",
        "if (i + 1) / steps >= self.start",
    ),
    Mutation(
        "control in the step after",
        "latents sdxl-control",
        CONTROL,
        "(i + 1) / steps <= self.end",
        "i / steps <= self.end",
    ),
    Mutation(
        "control up to the last timestep only",
        "latents sdxl-control",
        CONTROL,
        "times[acts[-1] + 1]",
        "times[acts[-1]]",
    ),
    Mutation(
        "no scale of control", "latents sdxl-control", CONTROL, "scalar(self.scale)", "scalar(1)"
    ),
    Mutation("range of 8 bits", "latents sdxl-control", CONTROL, "/ 255", "/ 256"),
    Mutation(
        "range of control pictures",
        "latents sdxl-control",
        CONTROL,
        "jnp.asarray(pixels, jnp.float32)",
        "jnp.asarray(2 * pixels - 1, jnp.float32)",
    ),
    Mutation(
        "guesses of the unconditional",
        "latents sd15-guess",
        f"{SD}:StableDiffusion.condition",
        "0.0 if negative else 1.0",
        "1.0 if negative else 0.0",
    ),
    Mutation(
        "rounding of the picture",
        "picture sd-turbo",
        "pipeline:to_bytes",
        "np.round(array * 255)",
        "(array * 255)",
    ),
]
"""What is computed before anything is compiled, or after."""

PROGRAMS = [
    Mutation(
        "last state of SDXL's encoders",
        "prompt sdxl-zeros",
        f"{SDXL}:StableDiffusionXL.encode",
        "skip=1 + clip_skip",
        "skip=clip_skip",
    ),
    Mutation(
        "second encoder first",
        "prompt sdxl-zeros",
        f"{SDXL}:StableDiffusionXL.encode",
        "[first.hidden_state, second.hidden_state]",
        "[second.hidden_state, first.hidden_state]",
    ),
    Mutation(
        "pooled from the first encoder",
        "prompt sdxl-zeros",
        f"{SDXL}:StableDiffusionXL.encode",
        "second.text_embeds",
        "first.pooled[:10]",
    ),
    Mutation(
        "pooled without projection",
        "prompt sdxl-zeros",
        f"{SDXL}:StableDiffusionXL.encode",
        "second.text_embeds",
        "second.pooled[:10]",
    ),
    Mutation(
        "no last norm of the prompt",
        "prompt sd-turbo",
        f"{SD}:StableDiffusion.encode",
        "clip.final_layer_norm(output.hidden_state)",
        "output.hidden_state",
    ),
    Mutation(
        "penultimate state of SD's encoder",
        "prompt sd-turbo",
        f"{SD}:StableDiffusion.encode",
        "skip=clip_skip",
        "skip=1 + clip_skip",
    ),
    Mutation(
        "no clip skip",
        "prompt sd-turbo-clip-skip",
        f"{SD}:StableDiffusion.encode",
        "skip=clip_skip",
        "skip=0",
    ),
    Mutation(
        "the timestep",
        "latents sd-turbo",
        f"{UNET_FAMILY}:Network.__call__",
        "row.timestep,",
        "row.timestep + 1,",
    ),
    Mutation(
        "noise without division by alpha",
        "latents sd-turbo",
        "sampling.parameterization:Epsilon.denoised",
        "jnp.where(known, row.alpha, 1)",
        "1",
    ),
    Mutation(
        "the network's input not scaled",
        "latents sd-turbo",
        f"{UNET_FAMILY}:Network.__call__",
        "latent = x.astype(self.dtype)",
        "latent = (x / row.alpha).astype(self.dtype)",
    ),
    Mutation(
        "epsilon for the data",
        "latents lightning-1",
        f"{UNET_FAMILY}:AbstractUNetFamily._scheduler",
        "settings.prediction_type,",
        "None,",
    ),
    Mutation(
        "epsilon for v",
        "latents sd21-rescale",
        f"{UNET_FAMILY}:AbstractUNetFamily.parameterization",
        "self._scheduler(configs, settings).prediction_type",
        "'epsilon'",
    ),
    Mutation(
        "sign of v",
        "latents sd21-rescale",
        "sampling.parameterization:VPrediction.denoised",
        "row.alpha * x - row.sigma",
        "row.alpha * x + row.sigma",
    ),
    Mutation(
        "the checkpoint's sampler",
        "latents sd2-ddim",
        f"{UNET_FAMILY}:AbstractUNetFamily._sampler",
        "if settings.sampler is None",
        "if True",
    ),
    Mutation(
        "guidance from the conditional",
        "latents sd2-ddim",
        "sampling.guidance:classifier_free",
        "guided = u +",
        "guided = c +",
    ),
    Mutation(
        "guidance the other way",
        "latents sd2-ddim",
        "sampling.guidance:stack_conditions",
        "jnp.stack([a, b])",
        "jnp.stack([b, a])",
    ),
    Mutation(
        "no guidance",
        "latents sdxl-zeros",
        f"{UNET_FAMILY}:AbstractUNetFamily._guides",
        "settings.guidance > 1",
        "settings.guidance > 9",
    ),
    Mutation(
        "contrast of the unconditional",
        "latents sd21-rescale",
        "sampling.guidance:classifier_free",
        "jnp.std(c) / jnp.std(guided)",
        "jnp.std(u) / jnp.std(guided)",
    ),
    Mutation(
        "share of the rescaled",
        "latents sd21-rescale",
        "sampling.guidance:classifier_free",
        "(amount * (jnp.std(c) / jnp.std(guided)) + (1 - amount))",
        "((1 - amount) * (jnp.std(c) / jnp.std(guided)) + amount)",
    ),
    Mutation(
        "contrast of each channel",
        "latents sd21-rescale",
        "sampling.guidance:classifier_free",
        "jnp.std(c) / jnp.std(guided)",
        "jnp.std(c, (0, 1)) / jnp.std(guided, (0, 1))",
    ),
    Mutation(
        "no rescaling",
        "latents sd21-rescale",
        f"{UNET_FAMILY}:AbstractUNetFamily.guidance",
        "settings.guidance_rescale or None",
        "None",
    ),
    Mutation(
        "guesses of both",
        "latents sd15-guess",
        f"{UNET_FAMILY}:Network.control",
        "control.scale * conditioning.wanted",
        "control.scale",
    ),
    Mutation(
        "guesses as heavy at every layer",
        "latents sd15-guess",
        f"{UNET_FAMILY}:Network.control",
        "guess=control.guess",
        "guess=False",
    ),
    Mutation(
        "one ControlNet of two",
        "latents sd2-controls",
        "models.unet.controlnet:sum_residuals",
        "jax.tree.map(jnp.add, first, other)",
        "other",
    ),
    Mutation(
        "first timestep without control",
        "latents sdxl-control",
        f"{UNET_FAMILY}:Network.control",
        "row.timestep <= control.first",
        "row.timestep < control.first",
    ),
    Mutation(
        "control at the timestep that it ends at",
        "latents sdxl-control",
        f"{UNET_FAMILY}:Network.control",
        "control.last < row.timestep",
        "control.last <= row.timestep",
    ),
    Mutation(
        "scale of the latent",
        "picture sd-turbo",
        "vae.autoencoder:AutoencoderKL.to_decoder",
        "wide / self.scaling_factor",
        "wide * self.scaling_factor",
    ),
    Mutation(
        "range of the picture",
        "picture sd-turbo",
        "pipeline:_decode",
        "image / 2 + 0.5",
        "image / 2 + 0.49",
    ),
]
"""What is compiled: here it is compiled again each time."""

CHECKS = {"prompt": check_prompt, "latents": check_latents, "picture": check_picture}


def check(name: str, root) -> None:
    """The test that has to fail."""
    stage, case = name.split()
    CHECKS[stage](case, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sd")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({m.check for m in [*NUMBERS, *PROGRAMS]}))
def test_the_checks_pass_unbroken(name, root):
    check(name, root)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", NUMBERS, ids=lambda mutation: mutation.name)
def test_another_number_is_seen(mutation, root, monkeypatch):
    apply(mutation, monkeypatch, traced=False)
    with pytest.raises(AssertionError):
        check(mutation.check, root)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", PROGRAMS, ids=lambda mutation: mutation.name)
def test_another_program_is_seen(mutation, root, monkeypatch):
    apply(mutation, monkeypatch)
    try:
        with pytest.raises(AssertionError):
            check(mutation.check, root)
    finally:
        jax.clear_caches()
