"""Pictures to what ControlNets read."""

import numpy as np
from jaxtyping import UInt8

from ._errors import EqxdiffError


LOW, HIGH = 100, 200
NEARLY = 16


def canny(
    image: UInt8[np.ndarray, "H W 3"], *, low: int = LOW, high: int = HIGH
) -> UInt8[np.ndarray, "H W 3"]:
    """The edges of an RGB picture, white on black, as the canny ControlNets were trained on.

    **Arguments:**

    - `low`, `high`: gradients, from 0 to about 1000, above which a pixel is an edge if it touches
        one, and in any case.

    **Raises:** `EqxdiffError` where OpenCV, the extra `control`, is not installed.

    Source: https://doi.org/10.1109/TPAMI.1986.4767851; OpenCV's `Canny`.
    """
    try:
        import cv2  # an extra, and heavy
    except ImportError:
        raise EqxdiffError(
            'Edges are found by OpenCV: pip install "eqxdiff[control]", or give a picture of edges.'
        ) from None
    edges = np.asarray(cv2.Canny(np.ascontiguousarray(image), low, high), np.uint8)
    return np.repeat(edges[:, :, None], 3, axis=2)


def shows_edges(image: UInt8[np.ndarray, "H W 3"]) -> bool:
    """Whether a picture is nothing but black and white, to within what JPEG does to it."""
    dark, light = image.max(axis=2) <= NEARLY, image.min(axis=2) >= 255 - NEARLY
    return bool((dark | light).mean() > 0.99)


PREPROCESSORS = {"canny": (canny, shows_edges)}
"""Kind of ControlNet -> what makes its picture of any other, and what tells that it is made."""
