"""The settings of FLUX.1."""

import dataclasses
from typing import ClassVar

from .._settings import GuidedSettings, SampledSettings, TiledSettings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxSettings(GuidedSettings, SampledSettings, TiledSettings):
    """The settings of FLUX.1."""

    components: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "transformer", "vae")

    prompt_2: str | None = setting(
        "The prompt for the second text encoder.",
        "Picture",
        absent="the prompt",
        a1111=lambda value: {"Prompt 2": value},
    )
    negative_prompt_2: str | None = setting(
        "The negative prompt for the second text encoder.",
        "Guidance",
        absent="the negative prompt",
        guided=True,
        a1111=lambda value: {"Negative prompt 2": value},
    )
    guidance: float | None = setting(
        "How much the prompt counts: the scale of the model's own guidance.",
        "Guidance",
        flags=("g", "guidance_scale"),
        absent="3.5 where it is embedded",
        a1111=lambda value: {"Distilled CFG Scale": f"{value:.9g}"},
    )
    cfg: float | None = setting(
        "The scale of true classifier-free guidance; 1 is off.",
        "Guidance",
        flags=("true_cfg_scale",),
        absent="1",
    )
    max_sequence_length: int = setting(
        "How many tokens of a prompt the second text encoder sees.",
        "Picture",
        default=512,
        low=1,
        high=512,
    )
    shift: float | None = setting(
        "The static shift of the noise levels.",
        "Sampling",
        absent="the checkpoint's",
        a1111=lambda value: {"Shift": value},
    )
