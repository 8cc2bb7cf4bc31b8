import abc
import math
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from .._dtypes import at_least_float32
from .._types import PRNGKey
from ..sharding import ways


class AbstractLinear(eqx.Module):
    """An affine map of the trailing axis, whatever it is stored as.

    Networks annotate their projections with this class and only ever call them, so that a layer
    with adapters or with quantised weights can stand in the place of a `Linear`.
    """

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Maps the trailing axis of `x`; the result has the dtype of `x`."""


class Linear(AbstractLinear):
    """An affine map of the trailing axis, in PyTorch's layout.

    The layer casts its weight to the dtype of the input, accumulates the products and adds the bias
    in at least float32, and rounds once to the dtype of the input. So the input decides the
    precision of the computation, and the weight only the precision of the storage.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"] | None

    @classmethod
    def init(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        key: PRNGKey,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Draws uniformly from `±1/sqrt(in_features)`, as `torch.nn.Linear` does."""
        bound = 1 / math.sqrt(in_features)
        weight_key, bias_key = jax.random.split(key)
        shape = (out_features, in_features)
        weight = jax.random.uniform(weight_key, shape, dtype, -bound, bound)
        if not bias:
            return cls(weight, None)
        return cls(weight, jax.random.uniform(bias_key, shape[:1], dtype, -bound, bound))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.over(x)

    def over(self, *parts: Float[Array, "*batch _"]) -> Float[Array, "*batch out"]:
        """Maps a trailing axis that comes in parts: their products are summed and rounded once."""
        dtype = parts[0].dtype
        wide = at_least_float32(dtype)
        ends = np.cumsum([x.shape[-1] for x in parts])[:-1]
        contract = (((parts[0].ndim - 1,), (1,)), ((), ()))
        products = [
            jax.lax.dot_general(x, weight.astype(dtype), contract, preferred_element_type=wide)
            for x, weight in zip(parts, jnp.split(self.weight, ends, axis=1), strict=True)
        ]
        y = sum(products[1:], start=products[0])
        if self.bias is not None:
            y = y + self.bias.astype(wide)
        return y.astype(dtype)


def side_by_side(
    layer: AbstractLinear, *parts: Float[Array, "*batch _"]
) -> Float[Array, "*batch out"]:
    """Computes `layer(jnp.concatenate(parts, axis=-1))`, by a `Linear` without the concatenation.

    The products are summed in at least float32 and rounded once. Layers of other kinds, such as
    those with adapters, get the concatenation.
    """
    if isinstance(layer, Linear) and ways("tensor") == 1:  # else cuts would go across devices
        return layer.over(*parts)
    return layer(jnp.concatenate(parts, axis=-1))


def settle(x: Array) -> Array:
    """Returns `x`, computed once and kept in memory for all who read it.

    XLA for TPUs otherwise computes a norm or an activation again within each matrix product that
    reads it, tile by tile, and the matrix unit waits for it.
    """
    return jax.lax.optimization_barrier(x)
