"""What the models around a text-conditional UNet have in common."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._errors import ConfigError, SettingError
from ...sampling import (
    DiscreteSchedulerConfig,
    Network,
    Sampler,
    Unguided,
    default_sampler,
    discrete_schedule,
    find_sampler,
    parameterization_of,
)
from ...text import CLIPTextConfig
from ...vae import AutoencoderKLConfig, decode_latent, encode_image
from .._family import Component, Configs, control_names
from .._model import AbstractModel, Inputs, Modules, Recipe
from .._recipe import guider_of, spread
from .._settings import check_guided, check_range, check_size, complete, image_step
from . import forms
from .config import UNetConfig
from .controlnet import ControlNet, ControlNetConfig
from .predictor import Controlled, UNetPredictor, UNetShared
from .rules import CONTROLNET
from .settings import UNetSettings


CONTROL_COMPONENT = Component(
    ControlNetConfig.parse, ControlNet.init, forms.CONTROLNET, CONTROLNET, "denoiser"
)
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""The classes that a checkpoint may name. For those that are not among the samplers, another must
be chosen."""

SHARED = (
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""What a ControlNet and its UNet must agree on."""


@dataclasses.dataclass(frozen=True)
class UNetConfigs:
    """The configs of a checkpoint that its model computes with."""

    unet: UNetConfig
    vae: AutoencoderKLConfig
    scheduler: DiscreteSchedulerConfig
    text_encoder: CLIPTextConfig
    pipeline: Any

    @classmethod
    def of(cls, configs: Configs) -> "UNetConfigs":
        """Picks them out. **Raises:** `ConfigError` where UNet and autoencoder do not fit."""
        own = cls(**{field.name: configs[field.name] for field in dataclasses.fields(cls)})
        latent, channels = own.vae.latent_channels, own.unet.in_channels
        if channels not in (latent, 2 * latent + 1):
            raise ConfigError(
                f"The UNet's in_channels is {channels}: with the VAE's {latent} it must be "
                f"{latent}, or {2 * latent + 1} for inpainting."
            )
        check_dims((("The UNet's out_channels", own.unet.out_channels, "the VAE's", latent),))
        return own


class AbstractUNetModel(AbstractModel):
    """A model whose denoiser is a UNet that was trained as a DDPM.

    - `ays`: its table of Align Your Steps.
    """

    ays: eqx.AbstractClassVar[Sequence[float]]
    settings: eqx.AbstractClassVar[type[UNetSettings]]
    configs: eqx.AbstractVar[Any]

    @property
    def inpaints(self) -> bool:
        return self.configs.unet.in_channels > self.configs.vae.latent_channels

    @abc.abstractmethod
    def decode_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """Returns the dtype to encode and decode pictures in where the UNet computes in `dtype`."""

    def resolve(self, given: Mapping[str, Any]) -> Any:
        settings = complete(self.settings, given, self.defaults, self.name)
        check_size(settings, self.configs.vae.downscale)
        layers = self.configs.text_encoder.num_hidden_layers
        check_range("clip_skip", settings.clip_skip or 0, 0, layers - 2)
        guidance = settings.guidance
        if guidance is not None and 0 < guidance < 1:
            raise SettingError(
                f"`guidance` {guidance} is out of range: it is above 1, or 1 or 0 for none."
            )
        if not self._guides(settings):
            check_guided(given, self.settings, self.name, "guidance")
        self.recipe(settings)
        return settings

    def shared(self, inputs: Inputs, settings: Any) -> UNetShared:
        scale = None
        if self.configs.unet.time_cond_proj_dim is not None:
            scale = jnp.asarray(settings.guidance or 1.0, jnp.float32)
        return UNetShared.make(inputs, scale)

    def network(self, modules: Modules, shared: UNetShared, dtype: DTypeLike) -> Network:
        network = UNetPredictor(modules["unet"], shared, jnp.dtype(dtype))
        if not shared.controls:
            return network
        nets = tuple(modules[name] for name in control_names(len(shared.controls)))
        return Controlled(network, nets)

    def recipe(self, settings: Any) -> Recipe:
        vae, scheduler = self.configs.vae, self._scheduler(settings)
        h, w = settings.height // vae.downscale, settings.width // vae.downscale
        sampler = self._sampler(settings)
        schedule = discrete_schedule(
            scheduler,
            settings.steps,
            sampler.grid,
            kind=spread(settings),
            table=self.ays,
            sigmas=settings.sigmas,
        ).since(image_step(settings))
        parameterization = parameterization_of(scheduler.prediction_type)
        return Recipe(
            (h, w, vae.latent_channels),
            schedule,
            sampler.solver_for(parameterization, eta=settings.eta),
            parameterization,
            guider_of(settings, settings.guidance, schedule)
            if self._guides(settings)
            else Unguided(),
        )

    def to_latent(
        self,
        modules: Modules,
        image: Float[Array, "H W 3"],
        noise: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "h w channels"]:
        return encode_image(modules["vae"], image, noise, self.decode_dtype(dtype), tiled=tiled)

    def to_image(
        self,
        modules: Modules,
        latent: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "H W 3"]:
        return decode_latent(modules["vae"], latent, self.decode_dtype(dtype), tiled=tiled)

    def _guides(self, settings: UNetSettings) -> bool:
        embeds = self.configs.unet.time_cond_proj_dim is not None
        return not embeds and settings.guidance is not None and settings.guidance > 1

    def _scheduler(self, settings: UNetSettings) -> DiscreteSchedulerConfig:
        changes = {
            "timestep_spacing": settings.timestep_spacing,
            "prediction_type": settings.prediction_type,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self.configs.scheduler, **changes)

    def _sampler(self, settings: UNetSettings) -> Sampler:
        if settings.sampler is None:
            return default_sampler(self.configs.scheduler)
        return find_sampler(settings.sampler)


def control_config(configs: Configs, fields: Mapping[str, Any] | None) -> ControlNetConfig:
    """Returns the config of a ControlNet for a UNet; that of the UNet where it has none.

    **Raises:** `ConfigError` where it was made for another model.
    """
    own: UNetConfig = configs["unet"]
    latent = configs["vae"].latent_channels
    if fields is None:
        return ControlNetConfig(dataclasses.replace(own, in_channels=latent))
    control = ControlNetConfig.parse(fields)
    pairs = [(name, getattr(control.unet, name), getattr(own, name)) for name in SHARED]
    for name, value, wanted in [*pairs, ("in_channels", control.unet.in_channels, latent)]:
        if value != wanted:
            raise ConfigError(
                f"The ControlNet does not fit the UNet: its {name} is {value} "
                f"and not {wanted}. It was made for another model."
            )
    if control.downscale != configs["vae"].downscale:
        raise ConfigError(
            f"The ControlNet does not fit the VAE: it shrinks images by {control.downscale} "
            f"and not by {configs['vae'].downscale}."
        )
    return control


def check_dims(pairs: Sequence[tuple[str, Any, str, Any]]) -> None:
    """**Raises:** `ConfigError` where two values, each after its name, differ."""
    for name, value, other, wanted in pairs:
        if value != wanted:
            raise ConfigError(f"{name} is {value} and {other} is {wanted}: they must be equal.")
