"""FLUX.1 bound to a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._errors import ConfigError, SettingError
from ...sampling import Flow, FlowSchedulerConfig, Network, Unguided, find_sampler, flow_sigmas
from ...text import Tokenizer
from ...vae import AutoencoderKLConfig, decode_latent, encode_image
from .._family import Configs
from .._model import PROMPT, AbstractModel, Inputs, Modules, Recipe, Text
from .._recipe import guider_of, spread
from .._settings import check_guided, check_size, complete, image_step
from .conditioning import FluxCondition, FluxShared, FluxTokens
from .config import TransformerConfig
from .predictor import FluxPredictor
from .settings import FluxSettings


PATCH = 2
DEFAULT_GUIDANCE = 3.5


class FluxModel(AbstractModel):
    """FLUX.1 dev, schnell, or a model of their architecture."""

    name: str = eqx.field(static=True)
    defaults: FluxSettings = eqx.field(static=True)
    transformer: TransformerConfig = eqx.field(static=True)
    vae: AutoencoderKLConfig = eqx.field(static=True)
    scheduler: FlowSchedulerConfig = eqx.field(static=True)

    @property
    def inpaints(self) -> bool:
        return False

    def resolve(self, given: Mapping[str, Any]) -> FluxSettings:
        settings = complete(FluxSettings, given, self.defaults, self.name)
        check_size(settings, PATCH * self.vae.downscale)
        if settings.shift is not None and settings.shift <= 0:
            raise SettingError(f"`shift` {settings.shift} is out of range: it is above 0.")
        if settings.sigmas is not None and settings.shift is not None:
            raise SettingError("`sigmas` are the noise levels themselves: give no `shift`.")
        embeds = self.transformer.guidance_embeds
        if given.get("guidance") is not None and not embeds:
            raise SettingError(
                f"{self.name} would ignore `guidance`: its transformer embeds none. "
                "For classifier-free guidance give `cfg` above 1."
            )
        if not _guides(settings):
            check_guided(given, FluxSettings, self.name, "cfg")
        guidance = DEFAULT_GUIDANCE if settings.guidance is None else settings.guidance
        settings = dataclasses.replace(settings, guidance=guidance if embeds else None)
        self.recipe(settings)
        return settings

    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, settings: FluxSettings, role: str
    ) -> Text:
        second = settings.prompt_2
        if role != PROMPT:
            prompt, second = settings.negative_prompt or "", settings.negative_prompt_2
        clip = tokenizers["tokenizer"].encode(prompt)
        t5 = tokenizers["tokenizer_2"].encode(
            prompt if second is None else second, settings.max_sequence_length
        )
        tokens = FluxTokens(jnp.asarray(clip.ids), jnp.asarray(t5.ids))
        return Text(tokens, {"text_encoder": clip, "text_encoder_2": t5})

    def encode(self, modules: Modules, tokens: FluxTokens, dtype: DTypeLike) -> FluxCondition:
        pooled = modules["text_encoder"](tokens.clip, dtype=dtype).pooled
        return FluxCondition(modules["text_encoder_2"](tokens.t5, dtype=dtype), pooled)

    def condition(self, encoded: FluxCondition, settings: FluxSettings, role: str) -> FluxCondition:
        return encoded

    def shared(self, inputs: Inputs, settings: FluxSettings) -> FluxShared:
        if settings.guidance is None:
            return FluxShared(None)
        return FluxShared(jnp.asarray(settings.guidance, jnp.float32))

    def network(self, modules: Modules, shared: FluxShared, dtype: DTypeLike) -> Network:
        return FluxPredictor(modules["transformer"], shared, jnp.dtype(dtype))

    def recipe(self, settings: FluxSettings) -> Recipe:
        h, w = settings.height // self.vae.downscale, settings.width // self.vae.downscale
        kind = spread(settings)
        if kind == "ays":
            raise SettingError("There are no ays sigmas for a rectified flow.")
        schedule = flow_sigmas(
            self.scheduler,
            settings.steps,
            sequence_length=(h // PATCH) * (w // PATCH),
            shift=settings.shift,
            kind=kind,
            sigmas=settings.sigmas,
        ).since(image_step(settings, floor=False))
        solver = find_sampler(settings.sampler or "euler").solver_for(Flow())
        guider = guider_of(settings, settings.cfg, schedule) if _guides(settings) else Unguided()
        return Recipe((h, w, self.vae.latent_channels), schedule, solver, Flow(), guider)

    def to_latent(
        self,
        modules: Modules,
        image: Float[Array, "H W 3"],
        noise: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "h w channels"]:
        return encode_image(modules["vae"], image, noise, dtype, tiled=tiled)

    def to_image(
        self,
        modules: Modules,
        latent: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "H W 3"]:
        return decode_latent(modules["vae"], latent, dtype, tiled=tiled)


def _guides(settings: FluxSettings) -> bool:
    return settings.cfg is not None and settings.cfg > 1


def bind(name: str, defaults: FluxSettings, configs: Configs) -> FluxModel:
    """Makes the model of a checkpoint. **Raises:** `ConfigError` where its parts do not fit."""
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
    for field, value, other, wanted in pairs:
        if value != wanted:
            raise ConfigError(f"The transformer's {field} {value} is not {other} {wanted}.")
    return FluxModel(name, defaults, transformer, vae, configs["scheduler"])
