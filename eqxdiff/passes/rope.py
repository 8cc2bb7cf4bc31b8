"""The order of the features that rope turns."""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.core
from jax.sharding import Sharding
from jaxtyping import Array

from ..nn import AbstractRotary, Adapted, Linear, Order, RMSNorm


Model = TypeVar("Model")


def reorder_rope(model: Model, order: Order, *, donate: bool = False) -> Model:
    """Returns the model with all attention that is turned by rope in one order of features.

    The rows of the projections to queries and keys are permuted within each head, with their
    biases, adapters and gains. Queries and keys are permuted alike, so their products stay.
    Attention of which a layer is of a kind that the pass does not know stays as it is.

    **Arguments:**

    - `donate`: free each weight as soon as its permuted form is there.
    """
    is_rotary = lambda node: isinstance(node, AbstractRotary)

    def where(node: AbstractRotary) -> list[Any]:
        names = (*node.queries, *node.query_norms, *node.keys, *node.key_norms)
        return [getattr(node, name) for name in names]

    def change(node: Any) -> Any:
        if not is_rotary(node) or node.order == order:
            return node
        layers = where(node)
        if not all(map(_known, layers)):
            return node
        layers = [_reorder(layer, node.heads, order, donate) for layer in layers]
        return dataclasses.replace(eqx.tree_at(where, node, layers), order=order)

    return jax.tree.map(change, model, is_leaf=is_rotary)


def _known(layer: Any) -> bool:
    if isinstance(layer, Adapted):
        return isinstance(layer.inner, Linear)
    return isinstance(layer, Linear | RMSNorm)


def _reorder(layer: Any, heads: int, order: Order, donate: bool) -> Any:
    """Permutes the outputs of a layer: each array along the axis that counts from its end."""
    if isinstance(layer, RMSNorm):
        axes, heads = {"weight": -1}, 1
    elif isinstance(layer, Linear):
        axes = {"weight": -2, "bias": -1}
    else:
        inner = _reorder(layer.inner, heads, order, donate)
        layer = eqx.tree_at(lambda layer: layer.inner, layer, inner)
        axes = {"up": -3, "rows": -1, "change": -2, "bias_change": -1}
    permute = _permute_donated if donate else _permute
    for name, axis in axes.items():
        value = getattr(layer, name)
        if value is not None:
            place = _place(value)
            value = permute(value, axis=axis, heads=heads, order=order)
            value = value if place is None else jax.device_put(value, place)
            layer = eqx.tree_at(lambda layer, name=name: getattr(layer, name), layer, value)
    return layer


def _place(x: Any) -> Sharding | None:
    """Returns where an array was put, if it was put anywhere in particular."""
    concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return x.sharding if concrete and x.committed else None


def _permuted(x: Array, *, axis: int, heads: int, order: Order) -> Array:
    """Permutes the features of each head along an axis."""
    before, after = x.shape[:axis], x.shape[axis:][1:]
    pairs = (-1, 2) if order == "halves" else (2, -1)
    y = x.reshape(*before, heads, *pairs, *after)
    return y.swapaxes(len(before) + 1, len(before) + 2).reshape(x.shape)


_permute = jax.jit(_permuted, static_argnames=("axis", "heads", "order"))
_permute_donated = jax.jit(
    _permuted, static_argnames=("axis", "heads", "order"), donate_argnames="x"
)
