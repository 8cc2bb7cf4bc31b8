"""Merging: the deltas of adapters added to the weights of a model, for good."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import equinox as eqx
import jax
import numpy as np

from .._errors import SettingError
from ..checkpoint import Table, leaf_paths
from ..nn import Adapted
from .adapter import Adapter
from .fit import Fitted, Hit, fit, layer_path, scatter, widen
from .index import Target, find_targets, follow


Model = TypeVar("Model")


def merge(
    model: Model,
    adapters: Adapter | Sequence[Adapter],
    *,
    partial: bool = False,
    tables: Sequence[Table] | None = None,
) -> Model:
    """The model with adapters in its weights, each at its own strength.

    The deltas are dense, in the layout of the adapter's file, and go through the table that a
    checkpoint of that layout goes through; they are summed in float32 and rounded once.

    **Arguments:** as of `fit`.

    **Raises:** as `fit`; `SettingError` where the model has adapters at run time.
    """
    return merge_fitted(model, fit(model, adapters, partial=partial, tables=tables), tables=tables)


def unmerge(
    model: Model,
    adapters: Adapter | Sequence[Adapter],
    *,
    partial: bool = False,
    tables: Sequence[Table] | None = None,
) -> Model:
    """The model before `merge`, but for rounding in the dtype of its weights.

    **Raises:** `SettingError` for what cannot be undone: a DoRA and a replaced weight depend on
    the weights as they were. Keep the model that was merged into instead.
    """
    adapters = (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    for adapter in adapters:
        for patch in adapter.patches:
            if patch.magnitude is not None or (patch.kind and patch.kind.name == "set"):
                raise SettingError(
                    f"{adapter.name} has {patch.kind_name} patches, which cannot be undone: "
                    "keep the model that it was merged into."
                )
    fitted = fit(model, adapters, partial=partial, widen=False, tables=tables)
    return merge_fitted(model, fitted, sign=-1.0, tables=tables)


def merge_fitted(
    model: Model, fitted: Fitted, *, sign: float = 1.0, tables: Sequence[Table] | None = None
) -> Model:
    """As `merge`, for adapters that are fitted already, perhaps to more components than these."""
    parts = [part for part in find_targets(model, tables) if fitted.hits.get(part.name)]
    return replace_parts(model, parts, [_merge_part(part, fitted, sign) for part in parts])


def replace_parts(model: Model, parts: Sequence[Target], new: Sequence[Any]) -> Model:
    """The model with other components in the place of these."""
    if any(not part.path for part in parts):
        return new[0]
    if not parts:
        return model
    return eqx.tree_at(lambda m: [follow(m, list(part.path)) for part in parts], model, list(new))


def is_adapted(node: Any) -> bool:
    return isinstance(node, Adapted)


def is_array(leaf: Any) -> TypeGuard[jax.Array]:
    return isinstance(leaf, jax.Array)


def check_plain(module: Any, what: str) -> None:
    """**Raises:** `SettingError` where a module has adapters at run time."""
    if any(map(is_adapted, jax.tree.leaves(module, is_leaf=is_adapted))):
        raise SettingError(
            f"{what} needs a model without adapters at run time: call eqxdiff.lora.remove first."
        )


Layer = tuple[str, int | None]
"""A leaf, and which layer of it where it is a stack."""


def _merge_part(part: Target, fitted: Fitted, sign: float) -> Any:
    check_plain(part.module, "Merging")
    module = widen(part.module, fitted.widened.get(part.name, {}))
    leaves = leaf_paths(module)
    if not all(leaf.is_fully_addressable for leaf in leaves.values() if is_array(leaf)):
        raise SettingError(
            f"{part.name} is spread over several processes, where adapters cannot be merged: "
            "apply them at run time, or merge them first with `eqxdiff lora merge`."
        )
    hits = sorted(fitted.hits[part.name], key=lambda hit: _first(hit))
    left = Counter(layer for hit in hits for layer in _layers(hit))
    pending: dict[Layer, np.ndarray] = {}
    new: dict[str, np.ndarray] = {}
    shapes = _new_biases(hits, leaves)

    def add(hit: Hit, moves: Sequence[Any], delta: np.ndarray) -> None:
        strength = fitted.adapters[hit.slot].strength
        for move in moves:
            scale = sign * strength.at(f"{part.name}.{layer_path(move, part.depth(move.leaf))}")
            layer = (move.leaf, move.layer)
            if layer not in pending:
                shape = shapes.get(move.leaf) or leaves[move.leaf].shape
                pending[layer] = np.zeros(shape[(move.layer is not None) :], np.float32)
            pending[layer][move.low : move.high] += np.float32(scale) * scatter(move, delta)

    for hit in hits:
        delta = hit.delta(leaves)
        if delta is not None and hit.weight is not None:
            add(hit, hit.weight.moves, delta)
        if hit.patch.bias is not None and hit.bias is not None:
            add(hit, hit.bias.moves, hit.patch.bias.reshape(-1))
        for layer in _layers(hit):
            left[layer] -= 1
            if not left[layer]:
                _write(new, leaves, shapes, layer, pending.pop(layer))
    return _replace(module, leaves, new)


def _first(hit: Hit) -> tuple[str, int, int]:
    tensor = hit.weight or hit.bias
    assert tensor is not None
    move = tensor.moves[0]
    return move.leaf, move.layer or 0, hit.slot


def _layers(hit: Hit) -> set[Layer]:
    tensors = [tensor for tensor in (hit.weight, hit.bias) if tensor is not None]
    return {(move.leaf, move.layer) for tensor in tensors for move in tensor.moves}


def _new_biases(hits: Sequence[Hit], leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of biases that layers do not have yet."""
    shapes = {}
    for hit in hits:
        for move in hit.bias.moves if hit.bias is not None else ():
            if move.leaf not in leaves:
                weight = leaves[f"{move.leaf.rpartition('.')[0]}.weight"].shape
                shapes[move.leaf] = weight[: 1 + (move.layer is not None)]
    return shapes


def _write(
    new: dict[str, np.ndarray],
    leaves: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    layer: Layer,
    delta: np.ndarray,
) -> None:
    leaf, index = layer
    if leaf not in new:
        if leaf in leaves:
            new[leaf] = np.array(leaves[leaf])
        else:
            weight = leaves[f"{leaf.rpartition('.')[0]}.weight"]
            new[leaf] = np.zeros(shapes[leaf], weight.dtype)
    target = new[leaf] if index is None else new[leaf][index]
    wide = np.promote_types(target.dtype, np.float32)
    target[...] = (target.astype(wide) + delta).astype(target.dtype)


def _replace(module: Any, leaves: Mapping[str, Any], new: Mapping[str, np.ndarray]) -> Any:
    """The module with other leaves, each where the one it replaces was."""
    if not new:
        return module
    arrays = []
    for path, array in new.items():
        old = leaves.get(path)
        place = old.sharding if isinstance(old, jax.Array) and old.committed else None
        arrays.append(jax.device_put(array, place))
    where: Callable[[Any], list[Any]] = lambda m: [follow(m, path.split(".")) for path in new]
    return eqx.tree_at(where, module, arrays, is_leaf=lambda node: node is None)
