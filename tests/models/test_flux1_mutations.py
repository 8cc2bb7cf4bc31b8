"""Every constant and convention of FLUX.1, broken one at a time: each must fail a parity test."""

import jax
import numpy as np
import pytest
import test_clip
import test_flux1
import test_flux1_pipeline
import test_t5
from helpers import FIXTURES, write_checkpoint
from mutate import Mutation, apply


FLUX, NN, TEXT = "models.flux1", "nn", "text"
MUTATIONS = [
    # The transformer.
    Mutation("rope theta", "dev-square", f"{FLUX}.network", "THETA", "1000.0"),
    Mutation("layer norm epsilon", "norms", f"{FLUX}.layers", "EPS", "1e-5"),
    Mutation("layer norm epsilon down", "norms", f"{FLUX}.layers", "EPS", "1e-7"),
    Mutation("gelu by erf in blocks", "dev-square", f"{FLUX}.network", "gelu_tanh", "jax.nn.silu"),
    Mutation(
        "gelu kind",
        "dev-square",
        f"{NN}.mlp:gelu_tanh",
        "approximate=True",
        "approximate=False",
    ),
    Mutation(
        "gate of the MLP",
        "dev-square",
        f"{FLUX}.network:DoubleBlock.__call__",
        "img_gate2 * self.ff(",
        "img_gate1 * self.ff(",
    ),
    Mutation(
        "shift and scale of the last norm",
        "dev-square",
        f"{FLUX}.network:Transformer.capture",
        "scale, shift = self.norm_out",
        "shift, scale = self.norm_out",
    ),
    Mutation(
        "scale without one",
        "dev-square",
        f"{FLUX}.layers:modulate",
        "1 + scale.astype",
        "scale.astype",
    ),
    Mutation(
        "no silu before modulation",
        "dev-square",
        f"{FLUX}.layers:Modulation.__call__",
        "silu(vec)",
        "vec",
    ),
    Mutation(
        "no norm of queries",
        "dev-square",
        f"{FLUX}.layers:split_heads",
        "norm_q(heads[0])",
        "heads[0]",
    ),
    Mutation(
        "keys and values exchanged",
        "dev-square",
        f"{FLUX}.layers:split_heads",
        "(q, k, v)",
        "(q, v, k)",
    ),
    Mutation(
        "MLP before attention in a single block",
        "dev-square",
        f"{FLUX}.network:SingleBlock.__call__",
        "[self.attn(y, pe), gelu_tanh(self.proj_mlp(y))]",
        "[gelu_tanh(self.proj_mlp(y)), self.attn(y, pe)]",
    ),
    Mutation(
        "guidance in units",
        "dev-square",
        f"{FLUX}.layers:TimeTextEmbedding.__call__",
        "1000 * guidance",
        "guidance",
    ),
    Mutation(
        "sine before cosine",
        "dev-square",
        f"{FLUX}.layers:TimeTextEmbedding.__call__",
        "flip_sin_to_cos=True",
        "flip_sin_to_cos=False",
    ),
    Mutation(
        "frequency shift",
        "dev-square",
        f"{FLUX}.layers:TimeTextEmbedding.__call__",
        "freq_shift=0",
        "freq_shift=1",
    ),
    Mutation(
        "period of the sinusoid", "dev-square", f"{NN}.embedding:sinusoid", "10000.0", "1000.0"
    ),
    Mutation(
        "rope turns the other way", "dev-square", f"{NN}.rope:apply_rope", "b * sin,", "-b * sin,"
    ),
    Mutation(
        "rope in bfloat16",
        "dev-square",
        f"{FLUX}.network:Transformer.capture",
        "rope(positions,",
        "rope(positions.astype(jnp.bfloat16).astype(jnp.float32) * 1.001,",
    ),
    Mutation(
        "rows and columns exchanged",
        "dev-wide",
        f"{FLUX}.family:positions",
        "row, column], axis",
        "column, row], axis",
    ),
    Mutation(
        "order within a patch",
        "dev-square",
        f"{FLUX}.family:patchify",
        "(0, 2, 4, 1, 3)",
        "(0, 2, 1, 3, 4)",
    ),
    Mutation(
        "scale of attention",
        "dev-square",
        "kernels.attention:attention",
        "math.sqrt(q.shape[-1])",
        "q.shape[-1] ** 0.4",
    ),
    # The schedule.
    Mutation(
        "token count of the lowest shift",
        "dev-square",
        "sampling.flow:dynamic_shift",
        "config.base_shift - slope * config.base_image_seq_len",
        "config.base_shift - slope * 512",
    ),
    Mutation(
        "tokens instead of patches",
        "dev-square",
        f"{FLUX}.family:Flux1.schedule",
        "(h // PATCH) * (w // PATCH)",
        "h * w",
    ),
    Mutation(
        "static shift on the dynamic schedule",
        "dev-square",
        "sampling.flow:dynamic_shift",
        "math.exp(mu)",
        "config.shift",
    ),
    Mutation(
        "end of the schedule",
        "schnell-square",
        "sampling.flow:flow_sigmas",
        "1 / steps, steps",
        "0.01, steps",
    ),
    Mutation(
        "timestep as a fraction",
        "schnell-square",
        "sampling.flow:_straight",
        "np.float32(1000) * sigma",
        "sigma",
    ),
    Mutation(
        "classifier-free guidance from the conditional",
        "dev-cfg",
        "sampling.guidance:classifier_free",
        "guided = u +",
        "guided = c +",
    ),
    # The text encoders.
    Mutation(
        "CLIP's activation", "dev-square", f"{TEXT}.clip", "ACTIVATIONS", "{'quick_gelu': gelu_erf}"
    ),
    Mutation(
        "CLIP without causal mask",
        "dev-square",
        f"{TEXT}.clip:CLIPEncoder.__call__",
        "jnp.tri(x.shape[0], dtype=bool)[None]",
        "jnp.ones((1, x.shape[0], x.shape[0]), bool)",
    ),
    Mutation(
        "CLIP's epsilon",
        "clip",
        f"{TEXT}.clip:CLIPLayer.init",
        "eps=cfg.layer_norm_eps, dtype=dtype),\n        CLIPAttention",
        "eps=1e-4, dtype=dtype),\n        CLIPAttention",
    ),
    Mutation(
        "pooled state without the last norm",
        "dev-square",
        f"{TEXT}.clip:CLIPTextModel.capture",
        "pooled = last_hidden_state[end]",
        "pooled = x[end]",
    ),
    Mutation(
        "end of text by id",
        "clip",
        f"{TEXT}.clip:CLIPTextModel.capture",
        "jnp.argmax(tokens == self.eos_token_id)",
        "jnp.argmax(tokens)",
    ),
    Mutation("end of text by rank", "clip", f"{TEXT}.clip", "HIGHEST_ID", "-1"),
    Mutation(
        "T5's scores scaled",
        "dev-square",
        f"{TEXT}.t5:T5Attention.__call__",
        "scale=1.0",
        "scale=None",
    ),
    Mutation(
        "T5's gate",
        "dev-square",
        f"{TEXT}.t5:T5GatedMLP.__call__",
        "gelu_tanh(self.wi_0(x)) * self.wi_1(x)",
        "gelu_tanh(self.wi_1(x)) * self.wi_0(x)",
    ),
    Mutation(
        "T5's buckets one way",
        "dev-square",
        f"{TEXT}.t5:relative_buckets",
        "half * (distance > 0)",
        "half * (distance < 0)",
    ),
    Mutation(
        "T5's furthest distance",
        "t5",
        f"{TEXT}.t5:T5Encoder.init",
        "cfg.relative_attention_max_distance",
        "64",
    ),
    Mutation(
        "T5's epsilon",
        "t5",
        f"{TEXT}.t5:T5Block.init",
        "attention_key, dtype=dtype),\n        RMSNorm.init(dim, eps=cfg.layer_norm_epsilon",
        "attention_key, dtype=dtype),\n        RMSNorm.init(dim, eps=1e-5",
    ),
    Mutation(
        "T5 without its last norm",
        "dev-square",
        f"{TEXT}.t5:T5Encoder.capture",
        "self.final_layer_norm(x)",
        "x",
    ),
    Mutation(
        "the second prompt to CLIP",
        "dev-wide",
        f"{FLUX}.family:Flux1.tokenize",
        "clip.encode(prompt)",
        "clip.encode(prompt_2)",
    ),
    # The autoencoder and the picture.
    Mutation(
        "shift before scale",
        "dev-square",
        "vae.autoencoder:AutoencoderKL.to_decoder",
        "wide / self.scaling_factor + self.shift_factor",
        "(wide + self.shift_factor) / self.scaling_factor",
    ),
    Mutation(
        "range of the picture",
        "dev-square",
        "pipeline:_decode",
        "image / 2 + 0.5",
        "image / 2 + 0.49",
    ),
    Mutation(
        "rounding of the picture",
        "dev-square",
        "pipeline:to_bytes",
        "np.round(array * 255)",
        "(array * 255)",
    ),
]


def check(name: str, folders) -> None:
    """The test that has to fail."""
    if name in test_flux1_pipeline.CASES:
        test_flux1_pipeline.check_case(name, folders, reference("flux1_pipeline"))
    elif name == "norms":
        test_flux1.test_norms_have_the_epsilons_of_diffusers(reference("flux1"))
    elif name == "clip":
        for kind in test_clip.KINDS:
            test_clip.test_outputs_agree_with_transformers(reference("clip"), kind, "pooled")
        test_clip.test_the_end_is_the_highest_id_or_the_first_end_token(reference("clip"))
    elif name == "t5":
        for kind in test_t5.KINDS:
            test_t5.test_the_encoding_agrees_with_transformers(reference("t5"), kind)
    else:
        raise ValueError(name)


def reference(name: str) -> dict:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux1")
    return {model: write_checkpoint(root / model, model) for model in ("flux-dev", "flux-schnell")}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_seen(mutation, folders, monkeypatch):
    apply(mutation, monkeypatch)
    try:
        with pytest.raises(AssertionError):
            check(mutation.check, folders)
    finally:
        jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({mutation.check for mutation in MUTATIONS}))
def test_the_checks_pass_unbroken(name, folders):
    jax.clear_caches()
    check(name, folders)
