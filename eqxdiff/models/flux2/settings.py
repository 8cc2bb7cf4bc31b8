"""The settings of FLUX.2."""

import dataclasses
from typing import ClassVar

from .._settings import GuidedSettings, SampledSettings, TiledSettings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux2Settings(GuidedSettings, SampledSettings, TiledSettings):
    """The settings of FLUX.2."""

    components: ClassVar[tuple[str, ...]] = ("text_encoder", "transformer", "vae")

    guidance: float | None = setting(
        "How much the prompt counts: the scale of the model's own guidance.",
        "Guidance",
        low=0,
        flags=("g", "guidance_scale"),
        absent="4 for base models",
    )
    max_sequence_length: int = setting(
        "How many tokens of a prompt, in its chat, the text encoder sees.",
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
