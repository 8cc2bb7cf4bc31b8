"""Reference pictures: what an editing model looks at while it makes a new picture."""

import dataclasses
import math

from .._errors import SettingError


@dataclasses.dataclass(frozen=True)
class References:
    """Which reference pictures a model takes, and how large it sees them.

    **Fields:**

    - `most`: how many.
    - `area`: a picture of more pixels is made smaller, to this area at most.
    - `multiple`: the sides that the model sees are multiples of this; the rest is cut off evenly.
    - `shortest`: the least length of a side, in pixels.
    - `longest`: how many times as long as the other a side may be.
    - `required`: whether the model makes nothing without a reference.
    """

    most: int
    area: int
    multiple: int
    shortest: int = 64
    longest: float = 8.0
    required: bool = False

    def check_count(self, count: int, model: str) -> None:
        """**Raises:** `SettingError` where there are too many references, or too few."""
        if count > self.most:
            raise SettingError(
                f"There are {count} pictures for `image`, and {model} takes up to {self.most}."
            )
        if self.required and not count:
            raise SettingError(f"{model} edits pictures: give it one by `image`.")

    def sizes(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the width and height to resize a picture to, and those to cut it to.

        **Raises:** `SettingError` for a picture that is too small or too long.
        """
        size, least = f"{width}x{height}", self.shortest
        if min(width, height) < least:
            raise SettingError(
                f"The picture for `image` is {size}: give one of {least}x{least} pixels at least."
            )
        if max(width, height) > self.longest * min(width, height):
            raise SettingError(
                f"The picture for `image` is {size}: its longer side may be {self.longest:g} times "
                "the other at most."
            )
        if width * height > self.area:
            scale = math.sqrt(self.area / (width * height))
            width, height = int(width * scale), int(height * scale)
        cut = tuple(side // self.multiple * self.multiple for side in (width, height))
        return (width, height), (cut[0], cut[1])
