"""Adapters at run time: arrays of low rank beside the weights, so that another adapter or another
strength compiles nothing."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._errors import SettingError
from ..checkpoint import Table, leaf_paths
from ..checkpoint.load import dotted
from ..nn import Adapted
from .components import find_components
from .filler import FEWEST_RANKS, Filler, Room, scales_of
from .fit import Adapters, fit
from .fitted import Fitted
from .merge import check_plain, is_adapted, replace_parts
from .merger import put_beside, with_leaves
from .strength import Strength


Model = TypeVar("Model")


def apply(
    model: Model,
    adapters: Adapters,
    *,
    partial: bool = False,
    rank: int = 0,
    reserve: Sequence[str] = (),
    tables: Sequence[Table] | None = None,
) -> Model:
    """Returns the model with adapters beside its weights: layers that change become `Adapted`.

    Adapters that touch the same layers with ranks of the same power of two make models of the same
    structure, so that a compiled function serves them all. `swap` puts others in their place,
    `rescale` changes their strengths, and `remove` takes them away.

    **Arguments:** those of `fit`, and

    - `rank`: the ranks of an adapter in a layer to make room for, at least; later adapters may
        then have as many.
    - `reserve`: beginnings of paths. Matrices and convolutions there get room even where no
        adapter touches them. The name of a component reserves all of it.

    **Raises:** as `fit`; `SettingError` where the model has adapters already.
    """
    fitted = fit(model, adapters, partial=partial, tables=tables)
    return apply_fitted(model, fitted, rank=rank, reserve=reserve)


def apply_fitted(
    model: Model,
    fitted: Fitted,
    *,
    rank: int = 0,
    reserve: Sequence[str] = (),
) -> Model:
    """Applies adapters that are fitted already, perhaps to more components than the model has.

    **Arguments:** those of `apply`.
    """
    parts = [part for part in fitted.find(model) if part.name in fitted.hits]
    new = []
    for part in parts:
        check_plain(part.module, "Applying adapters")
        filler = Filler(part, fitted)
        rooms = {path: room.at_least(rank) for path, room in filler.rooms().items()}
        rooms |= {
            path: Room(len(fitted.adapters), max(rank, FEWEST_RANKS))
            for path in filler.layers(reserve)
            if path not in rooms
        }
        new.append(filler.fill(rooms))
    return replace_parts(model, parts, new)


def swap(
    model: Model,
    adapters: Adapters,
    *,
    partial: bool = False,
    tables: Sequence[Table] | None = None,
) -> Model:
    """Returns a model of the same structure with other adapters at run time in place of its own.

    **Arguments:** those of `fit`.

    **Raises:** as `fit`; `SettingError` where the model has no room for them. `remove` and then
    `apply` make room.
    """
    plain = remove(model)
    fitted = fit(plain, adapters, partial=partial, widen=False, tables=tables)
    olds = find_components(model, tables)
    parts, new = [], []
    for part, old in zip(find_components(plain, tables), olds, strict=True):
        rooms = {path: Room.of(node) for path, node in adapted_layers(old.module)}
        if rooms or fitted.hits.get(part.name):
            filler = Filler(part, fitted)
            filler.check(rooms)
            parts.append(part)
            new.append(filler.fill(rooms))
    return replace_parts(plain, parts, new)


def rescale(
    model: Model,
    strengths: Sequence[float | str | Strength],
    *,
    tables: Sequence[Table] | None = None,
) -> Model:
    """Returns the model with its adapters, in their order, at other strengths.

    **Raises:** `SettingError` where there are fewer slots than strengths.
    """
    rules = [Strength.make(strength) for strength in strengths]
    parts = [part for part in find_components(model, tables) if any(adapted_layers(part.module))]
    new = []
    for part in parts:
        paths, scales = [], []
        for path, node in adapted_layers(part.module):
            slots = node.scale.shape[-1]
            if len(rules) > slots:
                raise SettingError(f"{len(rules)} strengths are given for {slots} adapters.")
            layers = node.scale.shape[0] if node.scale.ndim == 2 else None
            paths.append(f"{path}.scale")
            scale = scales_of(part.name, path, part.depth(f"{path}.weight"), layers, slots, rules)
            scales.append(put_beside(scale, leaf_paths(node.inner)["weight"]))
        new.append(with_leaves(part.module, dict(zip(paths, scales, strict=True))))
    return replace_parts(model, parts, new)


def remove(model: Model) -> Model:
    """Returns the model without its adapters at run time."""
    inner = lambda node: node.inner if isinstance(node, Adapted) else node
    return jax.tree.map(inner, model, is_leaf=is_adapted)


def adapter_leaves(model: Any) -> Any:
    """Returns a PyTree that is `True` for the arrays of adapters at run time and `False` elsewhere.

    `eqx.partition(model, adapter_leaves(model))` separates the arrays that a fine-tuning trains.
    """

    def mark(node: Any) -> Any:
        if not isinstance(node, Adapted):
            return False
        own = jax.tree.map(lambda _: True, node)
        return eqx.tree_at(lambda n: n.inner, own, jax.tree.map(lambda _: False, node.inner))

    return jax.tree.map(mark, model, is_leaf=is_adapted)


def ensemble(
    model: Model,
    adapters: Sequence[Adapters],
    *,
    partial: bool = False,
    tables: Sequence[Table] | None = None,
) -> tuple[Model, Any]:
    """Returns one model with a stack of adapters, one for each member of an ensemble.

    The weights are not copied.

    **Arguments:** those of `fit`, with one adapter or several for each member.

    **Returns:** the model, in which the leaves of adapters have a leading axis of members, and the
    axes of its leaves for `eqx.filter_vmap(f, in_axes=(axes, ...))`.
    """
    all_fitted = [fit(model, one, partial=partial, widen=False, tables=tables) for one in adapters]
    members = []
    parts = find_components(model, tables)
    for part in parts:
        fillers = [Filler(part, fitted) for fitted in all_fitted]
        rooms: dict[str, Room] = {}
        for filler in fillers:
            for path, room in filler.rooms().items():
                rooms[path] = room.union(rooms.get(path, room))
        most = max(len(fitted.adapters) for fitted in all_fitted)
        rooms = {path: dataclasses.replace(room, slots=most) for path, room in rooms.items()}
        members.append([filler.fill(rooms) for filler in fillers])
    stacked = []
    for fillings in members:
        marks = adapter_leaves(fillings[0])
        join = lambda own, *leaves: jnp.stack(leaves) if own else leaves[0]
        stacked.append(jax.tree.map(join, marks, *fillings))
    whole = replace_parts(model, parts, stacked)
    axes = jax.tree.map(lambda own: 0 if own else None, adapter_leaves(whole))
    return whole, axes


def adapted_layers(module: Any) -> Iterator[tuple[str, Adapted]]:
    """Yields the layers of a component that have adapters at run time, after their paths."""
    for path, node in jax.tree_util.tree_flatten_with_path(module, is_leaf=is_adapted)[0]:
        if isinstance(node, Adapted):
            yield dotted(path), node
