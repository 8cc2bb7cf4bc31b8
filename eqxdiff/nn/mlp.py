from collections.abc import Callable
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._dtypes import at_least_float32
from .._types import PRNGKey
from .linear import AbstractLinear, Linear, settle


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes GELU by its tanh approximation in at least float32 and rounds once."""
    return jax.nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=True).astype(x.dtype)


def gelu_erf(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes GELU by the error function in at least float32 and rounds once."""
    return jax.nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=False).astype(x.dtype)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes `x * sigmoid(1.702 x)`, OpenAI CLIP's GELU, in at least float32 and rounds once."""
    wide = x.astype(at_least_float32(x.dtype))
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


class MLP(eqx.Module):
    """Linear, activation, linear."""

    proj_in: AbstractLinear
    proj_out: AbstractLinear
    activation: Callable[[Array], Array] = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        features: int,
        hidden: int,
        *,
        activation: Callable[[Array], Array],
        key: PRNGKey,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        key1, key2 = jax.random.split(key)
        return cls(
            Linear.init(features, hidden, key=key1, dtype=dtype),
            Linear.init(hidden, features, key=key2, dtype=dtype),
            activation,
        )

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return self.proj_out(settle(self.activation(self.proj_in(x))))
