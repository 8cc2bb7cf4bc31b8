import abc
import math
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._dtypes import at_least_float32
from .._types import PRNGKey


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
        wide = at_least_float32(x.dtype)
        weight = self.weight.astype(x.dtype)
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x, weight, contract, preferred_element_type=wide)
        if self.bias is not None:
            y = y + self.bias.astype(wide)
        return y.astype(x.dtype)
