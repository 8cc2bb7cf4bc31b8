"""Formulas and published tables that spread noise levels between a largest and a smallest."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .._errors import SettingError


Spacing = Literal["karras", "exponential", "beta"]

AYS_TABLES = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""sigma / alpha in ten steps, optimised for Stable Diffusion 1.5 and for SDXL.

Source: https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
"""


def spread(kind: Spacing, largest: float, smallest: float, steps: int) -> np.ndarray:
    """Returns `steps` levels from `largest` to `smallest`, both included, in float64.

    - `"karras"`: equal steps of the seventh root (https://arxiv.org/abs/2206.00364, equation 5).
    - `"exponential"`: equal steps of the logarithm.
    - `"beta"`: quantiles of Beta(0.6, 0.6) (https://arxiv.org/abs/2407.12173).
    """
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        root = 1 / 7
        return (largest**root + ramp * (smallest**root - largest**root)) ** 7
    if kind == "exponential":
        return np.exp(np.linspace(np.log(largest), np.log(smallest), steps))
    from scipy.special import betaincinv  # slow to import

    return smallest + betaincinv(0.6, 0.6, 1 - ramp) * (largest - smallest)


def ays(table: Sequence[float], steps: int) -> np.ndarray:
    """Returns `steps` levels of an Align Your Steps table, without the final level, which is 0.

    For another number of steps than the table's, it interpolates the logarithm of the levels, as
    the authors of the table do.
    """
    at = np.linspace(0, len(table) - 1, steps + 1)
    return np.exp(np.interp(at, np.arange(len(table)), np.log(table)))[:-1]


def explicit(sigmas: Sequence[float], steps: int | None, *, largest: float) -> np.ndarray:
    """Checks a list of noise levels that a user gave, and ends it at 0.

    **Raises:** `SettingError` where the levels do not fall, are out of range or are not `steps`.
    """
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or len(levels) == 0 or not np.isfinite(levels).all():
        raise SettingError("`sigmas` must be a list of numbers.")
    if levels[-1] != 0:
        levels = np.append(levels, 0.0)
    if len(levels) < 2 or levels[0] > largest or levels[-1] < 0 or (np.diff(levels) >= 0).any():
        raise SettingError(f"`sigmas` must fall, from at most {largest:g} to 0.")
    if steps is not None and steps != len(levels) - 1:
        raise SettingError(f"`sigmas` has levels for {len(levels) - 1} steps, not for {steps}.")
    return levels
