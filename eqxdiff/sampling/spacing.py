"""How to spread noise levels between a largest and a smallest: formulas and published tables."""

from typing import Literal

import numpy as np


Spacing = Literal["karras", "exponential", "beta"]


def spread(kind: Spacing, largest: float, smallest: float, steps: int) -> np.ndarray:
    """`steps` levels from `largest` to `smallest`, both included, in float64.

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
