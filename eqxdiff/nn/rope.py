import math
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._dtypes import at_least_float32


Order = Literal["pairs", "halves"]
"""Which features of a head `apply_rope` turns together."""


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


@jax.named_scope("rope")
def apply_rope(
    x: Float[Array, "tokens heads dim"],
    pe: Float[Array, "tokens 2 half"],
    order: Order = "pairs",
) -> Float[Array, "tokens heads dim"]:
    """Turns pairs of features in at least float32; the result has the dtype of `x`.

    In the order `"pairs"` features 2i and 2i + 1 are a pair, as FLUX's checkpoints have them. In
    the order `"halves"` features i and i + half are, which no device has to shuffle.
    """
    wide = at_least_float32(x.dtype)
    cos, sin = pe[:, 0, None, :].astype(wide), pe[:, 1, None, :].astype(wide)
    x, dtype = x.astype(wide), x.dtype
    if order == "halves":
        a, b = jnp.split(x, 2, axis=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
    turned = a * cos - b * sin, a * sin + b * cos
    if order == "halves":
        return jnp.concatenate(turned, axis=-1).astype(dtype)
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(dtype)


class AbstractRotary(eqx.Module):
    """Attention that turns its queries and keys by `apply_rope`, in either order of features.

    `passes.reorder_rope` changes the order, with the layers that produce the features.

    - `order`: static, the order of the features of a head.
    - `heads`: static, the number of heads.
    - `bounded`: static, whether no score can leave ±64: decided by `passes.bound_scores`.
    - `queries`, `keys`: the fields of the projections to queries and keys.
    - `query_norms`, `key_norms`: the fields of their norms, which act on one head.
    """

    order: eqx.AbstractVar[Order]
    heads: eqx.AbstractVar[int]
    bounded: eqx.AbstractVar[bool]
    queries: eqx.AbstractClassVar[tuple[str, ...]]
    query_norms: eqx.AbstractClassVar[tuple[str, ...]]
    keys: eqx.AbstractClassVar[tuple[str, ...]]
    key_norms: eqx.AbstractClassVar[tuple[str, ...]]
