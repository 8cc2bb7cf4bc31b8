"""The settings that all models around a text-conditional UNet have."""

import dataclasses
from typing import ClassVar

from .._settings import GuidedSettings, SampledSettings, TiledSettings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetSettings(GuidedSettings, SampledSettings, TiledSettings):
    """The settings of Stable Diffusion."""

    components: ClassVar[tuple[str, ...]] = ("text_encoder", "unet", "vae")

    guidance: float | None = setting(
        "How much the prompt counts: the scale of the model's own guidance.",
        "Guidance",
        low=0,
        flags=("g", "guidance_scale"),
        absent="none",
    )
    clip_skip: int | None = setting(
        "The number of CLIP's last layers to leave out, besides those that the model leaves out.",
        "Guidance",
        low=0,
        absent="0",
        a1111=lambda value: {"Clip skip": 1 + value},
    )
    timestep_spacing: str | None = setting(
        "How the timesteps are spaced.",
        "Sampling",
        choices=("leading", "trailing", "linspace"),
        absent="the checkpoint's",
    )
    eta: float | None = setting(
        "DDIM's share of new noise, from 0 to 1.",
        "Sampling",
        low=0,
        high=1,
        absent="0",
        a1111=lambda value: {"Eta": value},
    )
    prediction_type: str | None = setting(
        "The quantity that the network predicts.",
        "Sampling",
        choices=("epsilon", "v_prediction", "sample"),
        absent="the checkpoint's",
    )
