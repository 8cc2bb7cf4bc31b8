"""Layers with adapters beside their weights, at run time."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._dtypes import at_least_float32
from .conv import AbstractConv2d, Conv2d
from .linear import AbstractLinear, Linear


class Adapted(AbstractLinear, AbstractConv2d):
    """A layer that computes with `weight + sum of scale * delta` over its adapters.

    It stands in the place of its layer, and all its fields are arrays, so another adapter or
    another scale compiles nothing. The delta of an adapter is the sum of those of these terms that
    it has: `up @ down` of low rank (https://arxiv.org/abs/2106.09685), multiples of the weight's
    own rows and columns (https://arxiv.org/abs/2402.09353), and any change of weight and bias.
    Terms that an adapter lacks, and ranks that it does not use, are zeros. In a stack of blocks
    every array has the leading axis of the stack.

    **Fields:**

    - `inner`: a `Linear` or `Conv2d`. Where there are changes alone, any layer with a `weight`.
    - `scale`: one number for each adapter.
    - `down`: `(slots, rank, inputs)`; for a convolution one axis holds `in` and the kernel.
    - `up`: `(out, slots, rank)`.
    - `rows`, `columns`: `(slots, out)` and `(slots, in)`: how much of the weight itself to add.
    - `change`, `bias_change`: `(slots, *shape)`, with the shape of the weight and of the bias.
    """

    inner: eqx.Module
    scale: Float[Array, "*layers slots"]
    down: Float[Array, "*layers slots rank inputs"] | None = None
    up: Float[Array, "*layers out slots rank"] | None = None
    rows: Float[Array, "*layers slots out"] | None = None
    columns: Float[Array, "*layers slots in"] | None = None
    change: Float[Array, "..."] | None = None
    bias_change: Float[Array, "*layers slots out"] | None = None

    @property
    def weight(self) -> Float[Array, "..."]:
        """The whole weight that the layer computes with, in at least float32."""
        layer = self._changed()
        weight = layer.weight.astype(at_least_float32(layer.weight.dtype))
        inner: Any = self.inner
        own = inner.weight.astype(weight.dtype)
        if self.rows is not None:
            weight = weight + own * _along(self._sum(self.rows), 0, own.ndim).astype(own.dtype)
        if self.columns is not None:
            weight = weight + own * _along(self._sum(self.columns), 1, own.ndim).astype(own.dtype)
        if self.up is not None and self.down is not None:
            up = (self.up * self.scale[:, None]).reshape(self.up.shape[0], -1)
            delta = up @ self.down.reshape(up.shape[1], -1)
            weight = weight + delta.reshape(weight.shape).astype(weight.dtype)
        return weight

    @property
    def bias(self) -> Float[Array, " out"] | None:
        """The bias that the layer computes with."""
        return self._changed().bias

    def __call__(self, x: Array) -> Array:
        layer = self._changed()
        if self.rows is None and self.columns is None and self.down is None:
            return layer(x)
        if self.change is not None:  # the changes make a new weight anyway
            return eqx.tree_at(lambda x: x.weight, layer, self.weight)(x)
        wide = at_least_float32(x.dtype)
        unbiased = _with_bias(layer, None)
        if self.columns is None:
            y = unbiased(x).astype(wide)
        else:
            y = unbiased(
                (x.astype(wide) * (1 + self._sum(self.columns)).astype(wide)).astype(x.dtype)
            )
            y = y.astype(wide)
        if self.rows is not None:
            own = y if self.columns is None else unbiased(x).astype(wide)
            y = y + self._sum(self.rows).astype(wide) * own
        if self.up is not None and self.down is not None:
            y = y + self._low_rank(layer, self.up, self.down, x).astype(wide)
        if layer.bias is not None:
            y = y + layer.bias.astype(wide)
        return y.astype(x.dtype)

    def _low_rank(self, layer: Linear | Conv2d, up: Array, down: Array, x: Array) -> Array:
        wide = at_least_float32(x.dtype)
        flat = down.reshape(-1, *layer.weight.shape[1:])
        h = eqx.tree_at(lambda x: x.weight, _with_bias(layer, None), flat)(x)
        scale = jnp.repeat(self.scale, down.shape[1])
        h = (h.astype(wide) * scale.astype(wide)).astype(x.dtype)
        return Linear(up.reshape(up.shape[0], -1), None)(h)

    def _sum(self, parts: Array) -> Array:
        """Sums over the adapters, each times its scale."""
        return jnp.tensordot(self.scale.astype(parts.dtype), parts, 1)

    def _changed(self) -> Any:
        """Returns the inner layer with the changes added to its weight and bias."""
        layer: Any = self.inner
        if self.change is not None:
            weight = layer.weight.astype(at_least_float32(layer.weight.dtype))
            weight = weight + self._sum(self.change).astype(weight.dtype)
            layer = eqx.tree_at(lambda x: x.weight, layer, weight)
        if self.bias_change is not None:
            bias = self._sum(self.bias_change)
            if layer.bias is not None:
                wide = at_least_float32(layer.bias.dtype)
                bias = layer.bias.astype(wide) + bias.astype(wide)
            layer = _with_bias(layer, bias)
        return layer


def _with_bias(layer: Any, bias: Array | None) -> Any:
    return eqx.tree_at(lambda x: x.bias, layer, bias, is_leaf=_is_none)


def _is_none(x: object) -> bool:
    return x is None


def _along(vector: Array, axis: int, ndim: int) -> Array:
    """Gives a vector axes of length 1 so that it lies along `axis`."""
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])
