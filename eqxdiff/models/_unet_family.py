"""What the families around a text-conditional UNet have in common."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._errors import ConfigError, SettingError
from .._types import Image, Scalar
from ..sampling import (
    AbstractParameterization,
    AbstractSolver,
    ClassifierFree,
    Conditioned,
    Denoiser,
    DiscreteSchedulerConfig,
    Row,
    Sampler,
    Schedule,
    default_sampler,
    discrete_schedule,
    find_sampler,
    parameterization_of,
    parse_discrete_config,
    stack_conditioning,
)
from . import _unet_forms
from ._controlnet import ControlNet, ControlNetConfig, sum_residuals
from ._family import (
    AbstractFamily,
    Component,
    Configs,
    Control,
    Guidance,
    Modules,
    control_names,
)
from ._settings import Settings, check_choice, check_range, check_size, complete, option, spacing
from ._unet import AddedConditioning, Residuals, UNet
from ._unet_rules import CONTROLNET


HONOURED = (
    "negative_prompt",
    "steps",
    "height",
    "width",
    "guidance",
    "guidance_rescale",
    "sequential_guidance",
    "clip_skip",
    "sampler",
    "schedule",
    "sigmas",
    "timestep_spacing",
    "eta",
    "prediction_type",
    "vae_tiling",
)
"""The settings that all of these families take."""

GUIDED = ("negative_prompt", "guidance_rescale", "sequential_guidance")
"""Those that count with classifier-free guidance alone, besides whatever is called negative."""

CONTROL_COMPONENT = Component(
    ControlNetConfig.parse, ControlNet.init, _unet_forms.CONTROLNET, CONTROLNET, "denoiser"
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
    "in_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""What a ControlNet and its UNet must agree on."""


class Conditioning(eqx.Module):
    """What a UNet knows of a prompt.

    **Fields:**

    - `context`: the prompt's hidden states, padding included.
    - `added`: of SDXL, the rest.
    - `wanted`: 1 for what guidance leads to, 0 for what it leads away from.
    """

    context: Float[Array, "*batch tokens context_dim"]
    added: AddedConditioning | None
    wanted: Float[Array, "*batch"]


class Network(eqx.Module):
    """A UNet and its ControlNets as the samplers call them.

    **Fields:**

    - `guidance`: told to a UNet that embeds it.
    """

    unet: UNet
    controlnets: tuple[ControlNet, ...]
    controls: tuple[Control, ...]
    guidance: Scalar | None
    dtype: DTypeLike = eqx.field(static=True)

    def __call__(self, x: Image, row: Row, conditioning: Conditioning) -> Image:
        latent = x.astype(self.dtype)
        residuals = None
        if self.controls:
            pairs = zip(self.controlnets, self.controls, strict=True)
            residuals = sum_residuals([self.control(*p, latent, row, conditioning) for p in pairs])
        output = self.unet(
            latent,
            row.timestep,
            conditioning.context.astype(self.dtype),
            conditioning.added,
            guidance=self.guidance,
            residuals=residuals,
        )
        return output.astype(x.dtype)

    def control(
        self, net: ControlNet, control: Control, x: Image, row: Row, conditioning: Conditioning
    ) -> Residuals:
        """What one ControlNet adds; between other timesteps than its own it is not even called."""
        scale = control.scale * conditioning.wanted if control.guess else control.scale

        def call() -> Residuals:
            return net(
                x,
                row.timestep,
                conditioning.context.astype(self.dtype),
                control.image.astype(self.dtype),
                conditioning.added,
                scale=scale,
                guess=control.guess,
            )

        acts = (control.last < row.timestep) & (row.timestep <= control.first)
        nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(call))
        return jax.lax.cond(acts, call, nothing)


class AbstractUNetFamily(AbstractFamily):
    """A family whose denoiser is a UNet that was trained as a DDPM.

    - `ays`: its table of Align Your Steps.
    """

    ays: eqx.AbstractClassVar[Sequence[float]]

    def parse_scheduler(self, fields: Mapping[str, Any]) -> DiscreteSchedulerConfig:
        return parse_discrete_config(fields, name="scheduler/scheduler_config.json")

    def control_config(
        self, configs: Configs, fields: Mapping[str, Any] | None
    ) -> ControlNetConfig:
        if fields is None:
            return ControlNetConfig(configs["unet"])
        control = ControlNetConfig.parse(fields)
        own, other = configs["unet"], control.unet
        for field in dataclasses.fields(own):
            name, wanted = field.name, getattr(own, field.name)
            if name in SHARED and getattr(other, name) != wanted:
                raise ConfigError(
                    f"The ControlNet does not fit the UNet: its {name} is {getattr(other, name)} "
                    f"and not {wanted}. It was made for another model."
                )
        if control.downscale != configs["vae"].downscale:
            raise ConfigError(
                f"The ControlNet does not fit the VAE: it shrinks images by {control.downscale} "
                f"and not by {configs['vae'].downscale}."
            )
        return control

    def resolve(
        self, given: Mapping[str, Any], model: str, defaults: Settings, configs: Configs
    ) -> Settings:
        settings = complete(given, defaults, self.honoured, model)
        check_range("steps", settings.steps, 1, 1000)
        check_size(settings, configs["vae"].downscale)
        check_choice(
            "timestep_spacing", settings.timestep_spacing, ("leading", "trailing", "linspace")
        )
        check_choice(
            "prediction_type", settings.prediction_type, ("epsilon", "v_prediction", "sample")
        )
        layers = configs["text_encoder"].num_hidden_layers
        check_range("clip_skip", settings.clip_skip or 0, 0, layers - 2)
        check_range("guidance_rescale", settings.guidance_rescale or 0.0, 0, 1)
        guidance = settings.guidance
        if guidance is not None and guidance < 1 and guidance != 0:
            raise SettingError(
                f"--guidance {guidance} is out of range: it is above 1, or 1 or 0 for none."
            )
        for name, value in given.items():
            needs = name in GUIDED or name.startswith("negative_")
            if value not in (None, False) and needs and not self._guides(configs, settings):
                raise SettingError(
                    f"{model} would ignore {option(name)} without classifier-free guidance: "
                    "give --guidance above 1."
                )
        self.solver(configs, settings)
        self.schedule(configs, settings)
        return settings

    def latent_shape(self, configs: Configs, settings: Settings) -> tuple[int, int, int]:
        vae = configs["vae"]
        h, w = settings.height // vae.downscale, settings.width // vae.downscale
        return h, w, vae.latent_channels

    def schedule(self, configs: Configs, settings: Settings) -> Schedule:
        return discrete_schedule(
            self._scheduler(configs, settings),
            settings.steps,
            self._sampler(configs, settings).grid,
            kind=spacing(settings),
            table=self.ays,
            sigmas=settings.sigmas,
        )

    def solver(self, configs: Configs, settings: Settings) -> AbstractSolver:
        parameterization = self.parameterization(configs, settings)
        return self._sampler(configs, settings).solver_for(parameterization, eta=settings.eta)

    def parameterization(self, configs: Configs, settings: Settings) -> AbstractParameterization:
        return parameterization_of(self._scheduler(configs, settings).prediction_type)

    def guidance(self, configs: Configs, settings: Settings) -> Guidance:
        scalar = lambda value: None if value is None else jnp.asarray(value, jnp.float32)
        if configs["unet"].time_cond_proj_dim is not None:
            return Guidance(scalar(settings.guidance or 1.0), None)
        if not self._guides(configs, settings):
            return Guidance(None, None)
        rescale, sequential = settings.guidance_rescale or None, bool(settings.sequential_guidance)
        return Guidance(None, scalar(settings.guidance), scalar(rescale), sequential)

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
        controlnets = tuple(modules[name] for name in control_names(len(controls)))
        network = Network(
            modules["unet"], controlnets, tuple(controls), guidance.embedded, jnp.dtype(dtype)
        )
        if unconditional is None or guidance.classifier_free is None:
            return Denoiser(Conditioned(network, conditional), parameterization)
        both = stack_conditioning(conditional, unconditional)
        scales = guidance.classifier_free, guidance.rescale
        predict = ClassifierFree(network, both, *scales, guidance.sequential)
        return Denoiser(predict, parameterization)

    def _guides(self, configs: Configs, settings: Settings) -> bool:
        embeds = configs["unet"].time_cond_proj_dim is not None
        return not embeds and settings.guidance is not None and settings.guidance > 1

    def _scheduler(self, configs: Configs, settings: Settings) -> DiscreteSchedulerConfig:
        changes = {
            "timestep_spacing": settings.timestep_spacing,
            "prediction_type": settings.prediction_type,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(configs["scheduler"], **changes)

    def _sampler(self, configs: Configs, settings: Settings) -> Sampler:
        if settings.sampler is None:
            return default_sampler(configs["scheduler"])
        return find_sampler(settings.sampler)


def check_dims(pairs: Sequence[tuple[str, Any, str, Any]]) -> None:
    """**Raises:** `ConfigError` where two values, each after its name, differ."""
    for name, value, other, wanted in pairs:
        if value != wanted:
            raise ConfigError(f"{name} is {value} and {other} is {wanted}: they must be equal.")
