"""Numbers from one dtype to another, never in silence to something that is not finite."""

from collections.abc import Iterable

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from .._errors import CheckpointError


def is_finite(array: np.ndarray) -> bool:
    """Tells whether a contiguous array has neither infinities nor NaNs; integers have none."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or not array.size:
        return True
    # What is not finite has the greatest bit patterns of either sign, infinity (or, where there is
    # none, the NaN) being the least of them: two integer maxima say it, fast and without memory.
    bits = array.dtype.itemsize * 8
    infinity = int(np.array(np.inf, array.dtype).view(f"u{bits // 8}"))
    signed = array.view(f"i{bits // 8}").max()
    unsigned = array.view(f"u{bits // 8}").max()
    return bool(signed < infinity and unsigned < infinity + (1 << (bits - 1)))


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns the narrowest dtype that holds all numbers of several dtypes."""
    found = set(dtypes)
    size = max(dtype.itemsize for dtype in found)
    wide = [dtype for dtype in found if dtype.itemsize == size]
    if len(wide) > 1 and size < 4:  # such as float16 and bfloat16
        return np.dtype(np.float32)
    return np.result_type(*wide)


def cast(
    piece: np.ndarray,
    out: np.ndarray,
    where: str,
    scale: float | None = None,
    *,
    undo: bool = False,
) -> None:
    """Writes finite numbers into `out`, multiplied by `scale`, or divided by it to undo this.

    **Raises:** `CheckpointError`, which begins with `where`, for a number too large for `out`.
    """
    fits = scale is None and _largest(piece.dtype) <= _largest(out.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        if scale is not None:
            wide = np.promote_types(piece.dtype, np.float32)
            piece, factor = piece.astype(wide), wide.type(scale)
            piece = piece / factor if undo else piece * factor
        out[...] = piece
    if not fits and not is_finite(np.ascontiguousarray(out)):
        raise CheckpointError(f"{where} holds a value too large for {out.dtype}.")


def _largest(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max) if jnp.issubdtype(dtype, jnp.floating) else 0.0
