import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._errors import ConfigError, SettingError
from ..._types import Image, Scalar, Tokens
from ...sampling import (
    AbstractParameterization,
    AbstractSolver,
    ClassifierFree,
    Conditioned,
    Denoiser,
    Flow,
    FlowSchedulerConfig,
    Row,
    Schedule,
    find_sampler,
    flow_sigmas,
    parse_flow_config,
    stack_conditioning,
)
from ...text import (
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5Encoder,
    Tokenized,
    Tokenizer,
    forms as text_forms,
    rules as text_rules,
)
from ...vae import AutoencoderKL, AutoencoderKLConfig, forms as vae_forms, rules as vae_rules
from .._family import AbstractFamily, Component, Configs, Control, Guidance, Modules, Preset
from .._files import PublishedFiles
from .._index import read_index
from .._settings import Settings, check_range, check_size, complete, option, spacing
from . import embedded, files, forms, rules, tiny
from .conditioning import Conditioning
from .config import TransformerConfig
from .network import Transformer


PATCH = 2
DEFAULT_GUIDANCE = 3.5
GUIDED = ("negative_prompt", "negative_prompt_2", "guidance_rescale", "sequential_guidance")
"""The settings that count with classifier-free guidance alone."""


def patchify(x: Float[Array, "h w c"]) -> Float[Array, "h*w//4 4*c"]:
    """Cuts a latent into patches of 2x2. The features of a patch are channel, row, column."""
    h, w, c = x.shape
    patches = x.reshape(h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 1, 3)
    return patches.reshape(h * w // 4, 4 * c)


def unpatchify(img: Float[Array, "pixels features"], h: int, w: int) -> Float[Array, "{h} {w} c"]:
    """The inverse of `patchify`."""
    patches = img.reshape(h // 2, w // 2, -1, 2, 2).transpose(0, 3, 1, 4, 2)
    return patches.reshape(h, w, -1)


def positions(tokens: int, h: int, w: int) -> Float[Array, "{tokens}+{h}*{w}//4 3"]:
    """(0, 0, 0) for each text token, then (0, row, column) of each patch."""
    row, column = jnp.meshgrid(jnp.arange(h // 2), jnp.arange(w // 2), indexing="ij")
    img = jnp.stack([jnp.zeros_like(row), row, column], axis=-1).reshape(-1, 3)
    return jnp.concatenate([jnp.zeros((tokens, 3), img.dtype), img]).astype(jnp.float32)


class Network(eqx.Module):
    """The transformer as the samplers call it: `(latent, row, conditioning) -> velocity`."""

    transformer: Transformer
    guidance: Scalar | None
    dtype: DTypeLike = eqx.field(static=True)

    def __call__(self, x: Image, row: Row, conditioning: Conditioning) -> Image:
        h, w, _ = x.shape
        velocity = self.transformer(
            patchify(x).astype(self.dtype),
            conditioning.txt.astype(self.dtype),
            conditioning.pooled.astype(self.dtype),
            row.timestep,
            self.guidance,
            positions(conditioning.txt.shape[0], h, w),
        )
        return unpatchify(velocity, h, w).astype(x.dtype)


class Flux1(AbstractFamily):
    """FLUX.1 dev and schnell (https://github.com/black-forest-labs/flux)."""

    presets: ClassVar[Mapping[str, Preset]] = types.MappingProxyType(
        {
            "flux-dev": Preset(
                "FLUX.1 [dev], 12 B, guidance-distilled",
                "black-forest-labs/FLUX.1-dev",
                Settings(
                    steps=28,
                    height=1024,
                    width=1024,
                    guidance=DEFAULT_GUIDANCE,
                    max_sequence_length=512,
                ),
            ),
            "flux-schnell": Preset(
                "FLUX.1 [schnell], 12 B, step-distilled",
                "black-forest-labs/FLUX.1-schnell",
                Settings(steps=4, height=1024, width=1024, max_sequence_length=256),
            ),
            **embedded.presets(),
        }
    )
    components: ClassVar[Mapping[str, Component]] = types.MappingProxyType(
        {
            "text_encoder": Component(
                CLIPTextConfig.parse, CLIPTextModel.init, text_forms.CLIP, text_rules.CLIP, "text"
            ),
            "text_encoder_2": Component(
                T5Config.parse, T5Encoder.init, text_forms.T5, text_rules.T5, "text"
            ),
            "transformer": Component(
                TransformerConfig.parse,
                Transformer.init,
                forms.TRANSFORMER,
                rules.TRANSFORMER,
                "denoiser",
            ),
            "vae": Component(
                AutoencoderKLConfig.parse,
                AutoencoderKL.init,
                vae_forms.AUTOENCODER,
                vae_rules.AUTOENCODER,
                "vae",
            ),
        }
    )
    tokenizers: ClassVar[Mapping[str, str]] = types.MappingProxyType(
        {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    )
    honoured: ClassVar[Sequence[str]] = (
        "prompt_2",
        "negative_prompt",
        "negative_prompt_2",
        "steps",
        "height",
        "width",
        "guidance",
        "cfg",
        "guidance_rescale",
        "sequential_guidance",
        "sampler",
        "schedule",
        "sigmas",
        "max_sequence_length",
        "shift",
        "vae_tiling",
    )
    controlnet: ClassVar[Component | None] = None
    files: ClassVar[PublishedFiles] = files.FILES

    def parse_scheduler(self, fields: Mapping[str, Any]) -> FlowSchedulerConfig:
        return parse_flow_config(fields, name="scheduler/scheduler_config.json")

    def parse_index(self, fields: Mapping[str, Any]) -> None:
        read_index(
            fields,
            pipelines=("FluxPipeline",),
            components={
                "scheduler": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
                "text_encoder": ("CLIPTextModel",),
                "text_encoder_2": ("T5EncoderModel",),
                "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
                "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
                "transformer": ("FluxTransformer2DModel",),
                "vae": ("AutoencoderKL",),
            },
        )

    def check(self, configs: Configs) -> None:
        transformer, vae = configs["transformer"], configs["vae"]
        clip, t5 = configs["text_encoder"], configs["text_encoder_2"]
        pairs = (
            ("joint_attention_dim", transformer.joint_attention_dim, "T5's d_model", t5.d_model),
            (
                "pooled_projection_dim",
                transformer.pooled_projection_dim,
                "CLIP's hidden_size",
                clip.hidden_size,
            ),
            (
                "in_channels",
                transformer.in_channels,
                "4 * the VAE's latent_channels",
                4 * vae.latent_channels,
            ),
        )
        for name, value, other, wanted in pairs:
            if value != wanted:
                raise ConfigError(f"The transformer's {name} {value} is not {other} {wanted}.")

    def control_config(self, configs: Configs, fields: Mapping[str, Any] | None) -> Any:
        raise ConfigError("There are no ControlNets for FLUX.1 yet.")

    def resolve(
        self, given: Mapping[str, Any], model: str, defaults: Settings, configs: Configs
    ) -> Settings:
        embeds = configs["transformer"].guidance_embeds
        settings = complete(given, defaults, self.honoured, model)
        check_range("steps", settings.steps, 1, 1000)
        check_range("max_sequence_length", settings.max_sequence_length, 1, 512)
        check_size(settings, PATCH * configs["vae"].downscale)
        if settings.shift is not None and settings.shift <= 0:
            raise SettingError(f"--shift {settings.shift} is out of range: it is above 0.")
        check_range("guidance_rescale", settings.guidance_rescale or 0.0, 0, 1)
        if settings.sigmas is not None and settings.shift is not None:
            raise SettingError("--sigmas are the noise levels themselves: give no --shift.")
        self.solver(configs, settings)
        self.schedule(configs, settings)
        if given.get("guidance") is not None and not embeds:
            raise SettingError(
                f"{model} would ignore --guidance: its transformer embeds none. "
                "For classifier-free guidance give --cfg above 1."
            )
        for name in GUIDED:
            if given.get(name) not in (None, False) and (settings.cfg is None or settings.cfg <= 1):
                raise SettingError(
                    f"{model} would ignore {option(name)} without classifier-free guidance: "
                    "give --cfg above 1."
                )
        guidance = DEFAULT_GUIDANCE if settings.guidance is None else settings.guidance
        return dataclasses.replace(settings, guidance=guidance if embeds else None)

    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, prompt_2: str, settings: Settings
    ) -> dict[str, Tokenized]:
        clip, t5 = tokenizers["tokenizer"], tokenizers["tokenizer_2"]
        return {
            "text_encoder": clip.encode(prompt),
            "text_encoder_2": t5.encode(prompt_2, settings.max_sequence_length),
        }

    def encode(
        self, modules: Modules, tokens: Mapping[str, Tokens], clip_skip: int, dtype: DTypeLike
    ) -> Conditioning:
        pooled = modules["text_encoder"](tokens["text_encoder"], dtype=dtype).pooled
        return Conditioning(
            modules["text_encoder_2"](tokens["text_encoder_2"], dtype=dtype), pooled
        )

    def absent(self, configs: Configs, encoded: Conditioning) -> Conditioning:
        return encoded

    def condition(
        self, settings: Settings, encoded: Conditioning, *, negative: bool
    ) -> Conditioning:
        return encoded

    def latent_shape(self, configs: Configs, settings: Settings) -> tuple[int, int, int]:
        vae = configs["vae"]
        return (
            settings.height // vae.downscale,
            settings.width // vae.downscale,
            vae.latent_channels,
        )

    def schedule(self, configs: Configs, settings: Settings) -> Schedule:
        h, w, _ = self.latent_shape(configs, settings)
        kind = spacing(settings)
        if kind == "ays":
            raise SettingError("There are no ays sigmas for a rectified flow.")
        return flow_sigmas(
            configs["scheduler"],
            settings.steps,
            sequence_length=(h // PATCH) * (w // PATCH),
            shift=settings.shift,
            kind=kind,
            sigmas=settings.sigmas,
        )

    def solver(self, configs: Configs, settings: Settings) -> AbstractSolver:
        return find_sampler(settings.sampler or "euler").solver_for(Flow())

    def parameterization(self, configs: Configs, settings: Settings) -> AbstractParameterization:
        return Flow()

    def guidance(self, configs: Configs, settings: Settings) -> Guidance:
        scalar = lambda value: jnp.asarray(value, jnp.float32)
        embeds = configs["transformer"].guidance_embeds
        free = settings.cfg is not None and settings.cfg > 1
        embedded = scalar(settings.guidance) if embeds else None
        if not free:
            return Guidance(embedded, None)
        rescale = scalar(settings.guidance_rescale) if settings.guidance_rescale else None
        sequential = bool(settings.sequential_guidance)
        return Guidance(embedded, scalar(settings.cfg), rescale, sequential)

    def denoiser(
        self,
        modules: Modules,
        conditional: Conditioning,
        unconditional: Conditioning | None,
        guidance: Guidance,
        controls: Sequence[Control],
        parameterization: AbstractParameterization,
        dtype: DTypeLike,
    ) -> Denoiser:
        network = Network(modules["transformer"], guidance.embedded, dtype)
        if unconditional is None or guidance.classifier_free is None:
            return Denoiser(Conditioned(network, conditional), parameterization)
        both = stack_conditioning(conditional, unconditional)
        scales = guidance.classifier_free, guidance.rescale
        predict = ClassifierFree(network, both, *scales, guidance.sequential)
        return Denoiser(predict, parameterization)

    def decode_dtype(self, configs: Configs, dtype: DTypeLike) -> DTypeLike:
        return dtype

    def example(self, model: str) -> Mapping[str, str]:
        return tiny.files(guidance_embeds=model == "flux-dev")
