"""What several tests share: deterministic weights and the measure of error."""

import zlib
from pathlib import Path

import numpy as np


FIXTURES = Path(__file__).parent / "fixtures"


def fake_tensor(name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """A float32 tensor that depends on its name and shape alone.

    Matrices and kernels are normal with standard deviation `gain / sqrt(fan_in)`, so that signals
    keep their size. Vectors called `weight` are scattered about one and other vectors about zero,
    so that no norm, bias or zero-initialised layer is trivial. The legacy generator's stream
    never changes.
    """
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        normal *= gain / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        normal = 1 + 0.3 * normal
    else:
        normal *= 0.2
    return normal.astype(np.float32)


def relative_error(value, reference) -> float:
    """The L2 norm of the difference over that of the reference, in float64."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, f"{value.shape} is not {reference.shape}"
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
