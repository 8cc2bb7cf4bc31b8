"""The settings of a sketch. This file needs no JAX."""

import dataclasses
from typing import ClassVar

from eqxdiff.models import GuidedSettings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SketchSettings(GuidedSettings):
    """Each field becomes an option of the command line, with its bounds and its help."""

    components: ClassVar[tuple[str, ...]] = ("scribe", "painter", "press")

    guidance: float | None = setting(
        "The scale of classifier-free guidance; 1 is off.", "Guidance", flags=("g",), absent="1"
    )
    boldness: float = setting(
        "How strongly the lines are drawn.",
        "Picture",
        default=1.0,
        low=0,
        high=2,
        absent="1",
        a1111=lambda value: {"Boldness": value},
    )
    words: int = setting(
        "How many tokens of a prompt the model sees.",
        "Picture",
        default=24,
        low=2,
        high=64,
        absent="24",
    )
