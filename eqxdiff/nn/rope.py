import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._dtypes import at_least_float32


def rope(
    positions: Float[Array, "tokens axes"], dims: Sequence[int], *, theta: float
) -> Float[Array, "tokens 2 half"]:
    """Returns the cosines and sines of a rotary embedding, in at least float32.

    Each axis `a` of the positions turns `dims[a] / 2` pairs of features, at the frequencies
    `theta ** -(2 i / dims[a])`; the axes are concatenated, so `half = sum(dims) / 2`.

    Source: https://arxiv.org/abs/2104.09864, and `rope` and `EmbedND` of
    https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbbcdf4f2d2a3ca8f0a9a5a7/src/flux/math.py
    """
    dtype = at_least_float32(positions.dtype)
    angles = []
    for axis, dim in enumerate(dims):
        frequency = np.exp(-math.log(theta) * np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(positions[:, axis, None].astype(dtype) * jnp.asarray(frequency, dtype))
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


def apply_rope(
    x: Float[Array, "tokens heads dim"], pe: Float[Array, "tokens 2 half"], *, halves: bool = False
) -> Float[Array, "tokens heads dim"]:
    """Turns pairs of features in at least float32; the result has the dtype of `x`.

    **Arguments:**

    - `halves`: whether a pair is a feature of the first half and its like in the second, as in
        language models, rather than two neighbours.
    """
    wide = at_least_float32(x.dtype)
    cos, sin = pe[:, 0, None, :].astype(wide), pe[:, 1, None, :].astype(wide)
    axis = -2 if halves else -1
    pairs = x.astype(wide).reshape(*x.shape[:-1], *((2, -1) if halves else (-1, 2)))
    a, b = jnp.moveaxis(pairs, axis, 0)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=axis)
    return turned.reshape(x.shape).astype(x.dtype)
