"""The option `--control canny=photo.png@0.5:0-0.8`."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eqxdiff import ControlImage, SettingError
from eqxdiff.control import PREPROCESSORS
from eqxdiff.models import check_range
from eqxdiff.pictures import read_picture

from .progress import AbstractReport


STRENGTH = re.compile(r"@(\d*\.?\d+)(?::(\d*\.?\d+)-(\d*\.?\d+))?$")


@dataclasses.dataclass(frozen=True)
class ControlOption:
    """A ControlNet by name, repository or folder, the picture that it reads, and its strength."""

    net: str
    image: Path
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "ControlOption":
        """Reads `NET=IMAGE[@SCALE[:START-END]]`. **Raises:** `SettingError`."""
        net, equals, rest = text.partition("=")
        if not (net and equals and rest):
            raise SettingError(
                f"--control {text} is not understood: write NET=IMAGE or NET=IMAGE@SCALE, as in "
                "canny=photo.png@0.5."
            )
        numbers: Sequence[str] = ()
        match = STRENGTH.search(rest)
        if match and not Path(rest).exists():
            rest, numbers = rest[: match.start()], [n for n in match.groups() if n]
        option = cls(net, Path(rest), *map(float, numbers))
        check_range("control", option.start, 0, 1)
        check_range("control", option.end, 0, 1)
        return option


@dataclasses.dataclass(frozen=True)
class OpenedControls:
    """The pictures as the ControlNets read them, and the facts that are recorded about them."""

    images: tuple[ControlImage, ...]
    record: list[dict[str, Any]]


def open_controls(
    options: Sequence[ControlOption], *, guess: bool, as_is: bool, report: AbstractReport
) -> OpenedControls:
    """Reads the pictures, and finds the edges in a photograph for a canny ControlNet.

    **Arguments:**

    - `guess`: as of `ControlImage`.
    - `as_is`: whether photographs stay as they are.

    **Raises:** `SourceError` where a picture cannot be read.
    """
    images, record = [], []
    for option in options:
        pixels = read_picture(option.image)
        prepared = None
        make, is_made = PREPROCESSORS.get(option.net, (None, None))
        if make is not None and is_made is not None and not as_is and not is_made(pixels):
            pixels, prepared = make(pixels), option.net
            report.note(
                "control",
                f"{option.image}: {option.net} was applied; --control-as-is keeps the picture",
                image=str(option.image),
            )
        images.append(ControlImage(pixels, option.scale, option.start, option.end, guess))
        sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
        fields = {**dataclasses.asdict(option), "image": option.image.name, "guess": guess}
        record.append({**fields, "prepared": prepared, "sha256": sha256})
    return OpenedControls(tuple(images), record)
