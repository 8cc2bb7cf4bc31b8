"""FLUX.2 bound to a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._errors import ConfigError, SettingError
from ...sampling import Flow, FlowSchedulerConfig, Network, Unguided, find_sampler, flow_sigmas
from ...text import QWEN3_DIRECT, Qwen3Config, Tokenizer
from .._family import Configs
from .._model import PROMPT, AbstractModel, Inputs, Modules, Recipe, Text
from .._recipe import guider_of, spread
from .._references import References
from .._settings import check_guided, check_size, complete
from .conditioning import Flux2Condition, Flux2Shared, Flux2Tokens
from .config import AutoencoderKLFlux2Config, Flux2TransformerConfig
from .predictor import Flux2Predictor
from .schedule import compute_empirical_mu
from .settings import Flux2Settings


TAPS = 9, 18, 27
"""The depths at which Qwen3's states are read."""


class Flux2Model(AbstractModel):
    """FLUX.2 [klein], distilled or base.

    - `distilled`: whether the model makes pictures in few steps without guidance.
    """

    name: str = eqx.field(static=True)
    defaults: Flux2Settings = eqx.field(static=True)
    transformer: Flux2TransformerConfig = eqx.field(static=True)
    vae: AutoencoderKLFlux2Config = eqx.field(static=True)
    scheduler: FlowSchedulerConfig = eqx.field(static=True)
    distilled: bool = eqx.field(static=True)

    @property
    def inpaints(self) -> bool:
        return False

    def resolve(self, given: Mapping[str, Any]) -> Flux2Settings:
        settings = complete(Flux2Settings, given, self.defaults, self.name)
        check_size(settings, self.vae.downscale)
        if settings.shift is not None and settings.shift <= 0:
            raise SettingError(f"`shift` {settings.shift} is out of range: it is above 0.")
        if settings.sigmas is not None and settings.shift is not None:
            raise SettingError("`sigmas` are the noise levels themselves: give no `shift`.")
        if self.distilled:
            wanted = {"guidance": settings.guidance, "negative_prompt": settings.negative_prompt}
            for name, value in wanted.items():
                if given.get(name) is not None and value is not None:
                    raise SettingError(
                        f"{self.name} would ignore `{name}`: it is distilled to need no guidance. "
                        "Base models take it."
                    )
            settings = dataclasses.replace(settings, guidance=None)
        if not _guides(settings):
            check_guided(given, Flux2Settings, self.name, "guidance")
        self.recipe(settings)
        return settings

    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, settings: Flux2Settings, role: str
    ) -> Text:
        prompt = prompt if role == PROMPT else settings.negative_prompt or ""
        length = settings.max_sequence_length
        tokens = QWEN3_DIRECT.encode(tokenizers["tokenizer"], prompt, length)
        ids, count = jnp.asarray(tokens.ids), jnp.asarray(tokens.length, jnp.int32)
        return Text(Flux2Tokens(ids, count), {"text_encoder": tokens})

    def encode(self, modules: Modules, tokens: Flux2Tokens, dtype: DTypeLike) -> Flux2Condition:
        return Flux2Condition(modules["text_encoder"](tokens.ids, tokens.length, dtype=dtype))

    def condition(
        self, encoded: Flux2Condition, settings: Flux2Settings, role: str
    ) -> Flux2Condition:
        return encoded

    def shared(self, inputs: Inputs, settings: Flux2Settings) -> Flux2Shared:
        return Flux2Shared(inputs.references, None)

    def network(self, modules: Modules, shared: Flux2Shared, dtype: DTypeLike) -> Network:
        return Flux2Predictor(modules["transformer"], shared, jnp.dtype(dtype))

    def recipe(self, settings: Flux2Settings) -> Recipe:
        h, w = settings.height // self.vae.downscale, settings.width // self.vae.downscale
        kind = spread(settings)
        if kind == "ays":
            raise SettingError("There are no ays sigmas for a rectified flow.")
        mu = compute_empirical_mu(h * w, settings.steps)
        schedule = flow_sigmas(
            dataclasses.replace(self.scheduler, base_shift=mu, max_shift=mu),
            settings.steps,
            sequence_length=h * w,
            shift=settings.shift,
            kind=kind,
            sigmas=settings.sigmas,
        )
        solver = find_sampler(settings.sampler or "euler").solver_for(Flow())
        guides = _guides(settings)
        guider = guider_of(settings, settings.guidance, schedule) if guides else Unguided()
        return Recipe((h, w, self.vae.channels), schedule, solver, Flow(), guider)

    def to_latent(
        self,
        modules: Modules,
        image: Float[Array, "H W 3"],
        noise: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "h w channels"]:
        return modules["vae"].encode(image, noise, dtype, tiled=tiled)

    def to_image(
        self,
        modules: Modules,
        latent: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "H W 3"]:
        return modules["vae"].decode(latent, dtype, tiled=tiled)


def _guides(settings: Flux2Settings) -> bool:
    return settings.guidance is not None and settings.guidance > 1


def parse_encoder(fields: Mapping[str, Any]) -> Qwen3Config:
    """Reads `text_encoder/config.json`. **Raises:** `ConfigError`."""
    return Qwen3Config.parse(fields, taps=TAPS)


def bind(name: str, defaults: Flux2Settings, configs: Configs) -> Flux2Model:
    """Makes the model of a checkpoint. **Raises:** `ConfigError` where its parts do not fit."""
    transformer, vae = configs["transformer"], configs["vae"]
    read = len(TAPS) * configs["text_encoder"].hidden_size
    pairs = (
        ("joint_attention_dim", transformer.joint_attention_dim, "3 * Qwen3's hidden_size", read),
        ("in_channels", transformer.in_channels, "4 * the VAE's latent_channels", vae.channels),
    )
    for field, value, other, wanted in pairs:
        if value != wanted:
            raise ConfigError(f"The transformer's {field} {value} is not {other} {wanted}.")
    if transformer.guidance_embeds:
        raise ConfigError("The transformer's guidance_embeds is true, which no klein model has.")
    distilled = bool(configs["pipeline"].get("is_distilled", False))
    return Flux2Model(name, defaults, transformer, vae, configs["scheduler"], distilled)


def references(configs: Configs) -> References:
    """Returns which reference pictures a model of these configs takes: up to four of a megapixel.

    Source: `Flux2KleinPipeline` and `Flux2ImageProcessor` of diffusers, and
    https://docs.bfl.ml/guides/prompting_editing_overview for their number.
    """
    return References(most=4, area=2**20, multiple=configs["vae"].downscale)
