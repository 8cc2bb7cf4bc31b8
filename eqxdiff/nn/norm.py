"""Normalisations. Statistics and scaling are computed in at least float32 and rounded once."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from .._dtypes import at_least_float32


def layer_norm(
    x: Float[Array, "*batch dim"],
    weight: Float[Array, " dim"] | None = None,
    bias: Float[Array, " dim"] | None = None,
    *,
    eps: float,
) -> Float[Array, "*batch dim"]:
    """Normalises the trailing axis to mean 0 and variance 1 (https://arxiv.org/abs/1607.06450).

    Adaptive layer norm passes `1 + scale` as `weight` and `shift` as `bias`.
    """
    wide = x.astype(at_least_float32(x.dtype))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(x.dtype)


class LayerNorm(eqx.Module):
    """`layer_norm` with a learned weight and bias."""

    weight: Float[Array, " dim"]
    bias: Float[Array, " dim"]
    eps: float = eqx.field(static=True)

    @classmethod
    def init(cls, dim: int, *, eps: float, dtype: DTypeLike = jnp.float32) -> Self:
        return cls(jnp.ones(dim, dtype), jnp.zeros(dim, dtype), eps)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(eqx.Module):
    """Root-mean-square normalisation of the trailing axis (https://arxiv.org/abs/1910.07467)."""

    weight: Float[Array, " dim"]
    eps: float = eqx.field(static=True)

    @classmethod
    def init(cls, dim: int, *, eps: float, dtype: DTypeLike = jnp.float32) -> Self:
        return cls(jnp.ones(dim, dtype), eps)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        wide = x.astype(at_least_float32(x.dtype))
        y = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (y * self.weight.astype(y.dtype)).astype(x.dtype)


class GroupNorm(eqx.Module):
    """Group normalisation of a channels-last image (https://arxiv.org/abs/1803.08494).

    The layer computes the variance from the centred values, in two passes, as PyTorch does.
    """

    weight: Float[Array, " channels"]
    bias: Float[Array, " channels"]
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    @classmethod
    def init(
        cls, channels: int, *, groups: int, eps: float, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """**Raises:** `ValueError` where `channels` is not a multiple of `groups`."""
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be split into {groups} groups.")
        return cls(jnp.ones(channels, dtype), jnp.zeros(channels, dtype), groups, eps)

    def __call__(self, x: Float[Array, "*space channels"]) -> Float[Array, "*space channels"]:
        wide = x.astype(at_least_float32(x.dtype))
        wide = wide.reshape(-1, self.groups, x.shape[-1] // self.groups)
        mean = jnp.mean(wide, axis=(0, 2))
        variance = jnp.mean(jnp.square(wide - mean[:, None]), axis=(0, 2))
        return self.normalize(x, mean, variance)

    def normalize(
        self,
        x: Float[Array, "*space channels"],
        mean: Float[Array, " groups"],
        variance: Float[Array, " groups"],
    ) -> Float[Array, "*space channels"]:
        """Normalises `x` by statistics that may come from elsewhere, in their dtype."""
        wide = x.astype(mean.dtype).reshape(-1, self.groups, x.shape[-1] // self.groups)
        wide = wide - mean[:, None]
        y = (wide * lax.rsqrt(variance + self.eps)[:, None]).reshape(x.shape)
        return (y * self.weight.astype(y.dtype) + self.bias.astype(y.dtype)).astype(x.dtype)
