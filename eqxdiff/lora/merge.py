"""Merging: the deltas of adapters added to the weights of a model, for good."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import equinox as eqx
import jax
import numpy as np

from .._errors import SettingError
from ..checkpoint import Table, leaf_paths
from ..distributed import put_like, to_host
from ..nn import Adapted
from ..passes import fast, is_fast
from .components import AdaptedComponent, follow
from .fit import Adapters, fit, opened, widen
from .fitted import Fitted, ReadLeaf
from .merger import Merger, whole_box, with_leaves


Model = TypeVar("Model")


def merge(
    model: Model,
    adapters: Adapters,
    *,
    partial: bool = False,
    tables: Sequence[Table] | None = None,
) -> Model:
    """Returns the model with adapters in its weights, each at its own strength.

    The deltas are summed in float32 and rounded once. The weights of the given model stay as they
    are, so that both are in memory: `eqxdiff.load` merges adapters while it reads the weights.

    **Arguments:** those of `fit`.

    **Raises:** as `fit`; `SettingError` where the model has adapters at run time.
    """
    return merge_fitted(model, fit(model, adapters, partial=partial, tables=tables))


def unmerge(
    model: Model,
    adapters: Adapters,
    *,
    partial: bool = False,
    tables: Sequence[Table] | None = None,
) -> Model:
    """Returns the model before `merge`, up to rounding in the dtype of its weights.

    **Raises:** `SettingError` for a DoRA and for a replaced weight, which cannot be undone because
    they depend on the weights before `merge`. Keep the model from before instead.
    """
    adapters = opened(adapters)
    for adapter in adapters:
        for patch in adapter.patches:
            if patch.magnitude is not None or (patch.kind and patch.kind.name == "set"):
                raise SettingError(
                    f"{adapter.name} has {patch.kind_name} patches, which cannot be undone: "
                    "keep the model that it was merged into."
                )
    fitted = fit(model, adapters, partial=partial, widen=False, tables=tables)
    return merge_fitted(model, fitted, sign=-1.0)


def merge_fitted(model: Model, fitted: Fitted, *, sign: float = 1.0) -> Model:
    """Merges adapters that are fitted already, perhaps to more components than the model has.

    **Arguments:**

    - `sign`: 1 adds the adapters, -1 subtracts them.
    """
    parts = [part for part in fitted.find(model) if fitted.hits.get(part.name)]
    return replace_parts(model, parts, [_merge_part(part, fitted, sign) for part in parts])


def replace_parts(model: Model, parts: Sequence[AdaptedComponent], new: Sequence[Any]) -> Model:
    """Returns the model with other components in the places of these, in the same form."""
    if not parts:
        return model
    where = lambda model: [follow(model, list(part.path)) for part in parts]
    pairs = zip(where(model), new, strict=True)
    formed = [fast(component) if is_fast(old) else component for old, component in pairs]
    if any(not part.path for part in parts):
        return formed[0]
    return eqx.tree_at(where, model, formed)


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


def _merge_part(part: AdaptedComponent, fitted: Fitted, sign: float) -> Any:
    check_plain(part.module, "Merging")
    module = widen(part.module, fitted.widened.get(part.name, {}))
    leaves = leaf_paths(module)
    merger = Merger(fitted, part.name, sign=sign)
    new = {}
    for path in merger.leaves:
        if path in leaves:
            old = leaves[path]
            buffer = np.array(to_host(old))  # one leaf at a time, on every process
            merger.change(path, buffer, whole_box(buffer.shape), reader_of(leaves))
            new[path] = put_like(buffer, old)
    return merger.finish(with_leaves(module, new))


def reader_of(leaves: Mapping[str, Any]) -> ReadLeaf:
    """Returns a function that reads boxes of leaves that are in memory."""
    last = functools.lru_cache(maxsize=1)(lambda path: to_host(leaves[path]))
    return lambda path, box: last(path)[tuple(slice(*bounds) for bounds in box)]
