import math
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from .._dtypes import at_least_float32
from .._types import PRNGKey, Scalar
from .linear import AbstractLinear, Linear


class Embedding(eqx.Module):
    """A table of vectors. The result has the dtype of the table."""

    weight: Float[Array, "entries dim"]

    @classmethod
    def init(cls, entries: int, dim: int, *, key: PRNGKey, dtype: DTypeLike = jnp.float32) -> Self:
        """Draws from a normal of unit variance, as `torch.nn.Embedding` does."""
        return cls(jax.random.normal(key, (entries, dim), dtype))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        return self.weight[ids]


def sinusoid(
    t: Scalar, dim: int, *, flip_sin_to_cos: bool, freq_shift: float, max_period: float = 10000.0
) -> Float[Array, " dim"]:
    """Embeds a timestep as sines and cosines, in at least float32.

    The sines come first, or the cosines with `flip_sin_to_cos`; the frequencies are
    `max_period ** -(i / (dim / 2 - freq_shift))`.

    **Arguments:**

    - `t`: the timestep, in thousandths: 0 is data and 1000 is noise.
    - `dim`: the even length of the result.

    Source: https://arxiv.org/abs/2006.11239, appendix B, and `get_timestep_embedding` of diffusers.
    """
    half = dim // 2
    dtype = at_least_float32(t.dtype)
    # The exponents are rounded as in the reference: the angles reach thousands of radians, so the
    # last bit of a frequency shows in the result.
    exponent = np.arange(half, dtype=dtype) * dtype.type(-math.log(max_period))
    frequency = np.exp((exponent / dtype.type(half - freq_shift)).astype(np.float64))
    angle = t.astype(dtype) * jnp.asarray(frequency, dtype)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos])


class EmbeddingMLP(eqx.Module):
    """Linear, SiLU, linear: the embedder of timesteps, guidance and pooled text in every family."""

    linear_1: AbstractLinear
    linear_2: AbstractLinear

    @classmethod
    def init(
        cls,
        in_features: int,
        features: int,
        *,
        bias: bool = True,
        key: PRNGKey,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        key1, key2 = jax.random.split(key)
        return cls(
            Linear.init(in_features, features, bias=bias, key=key1, dtype=dtype),
            Linear.init(features, features, bias=bias, key=key2, dtype=dtype),
        )

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.linear_2(silu(self.linear_1(x)))


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes `x * sigmoid(x)` in at least float32 and rounds once."""
    return jax.nn.silu(x.astype(at_least_float32(x.dtype))).astype(x.dtype)
