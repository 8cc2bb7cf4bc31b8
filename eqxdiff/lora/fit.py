"""Fitting: each patch of an adapter meets the module that it is for, or the reason why not."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial as bind
from typing import Any

import jax
import numpy as np

from .._errors import CheckpointError
from ..checkpoint import Table, leaf_paths
from ..checkpoint.listing import condense
from ..checkpoint.plan import Shape
from ..nn import Conv2d, Linear
from .adapter import Adapter, Patch
from .components import AdaptedComponent, NamedFamily, find_components, follow
from .fitted import Fitted, Hit, Report
from .formats import prefixes_of
from .index import LayerIndex, LayoutModule, LayoutTensor
from .kinds import magnitude_axis
from .source import load


Adapters = Adapter | str | Sequence[Adapter | str]
"""Adapters, or names of their files as `load` reads them."""

MOST_REASONS = 8


def opened(adapters: Adapters) -> tuple[Adapter, ...]:
    """Returns one or several adapters as a tuple, those that are given by name loaded."""
    several = [adapters] if isinstance(adapters, Adapter | str) else adapters
    return tuple(load(one) if isinstance(one, str) else one for one in several)


def fit(
    model: Any,
    adapters: Adapters,
    *,
    partial: bool = False,
    widen: bool = True,
    tables: Sequence[Table] | None = None,
    families: Sequence[NamedFamily] | None = None,
) -> Fitted:
    """Finds the modules that adapters are for, by names and shapes alone.

    **Arguments:**

    - `model`: a pipeline, a dictionary of components by name, or one; skeletons will do.
    - `adapters`: one or several, or their names as `load` reads them.
    - `partial`: accept tensors that cannot be applied; the reports list them.
    - `widen`: let an adapter that is made for it give a layer more inputs.
    - `tables`: the key tables of a model of no known family.
    - `families`: the families whose components and names are known; all by default.

    **Raises:** `CheckpointError` where a tensor cannot be applied, or none can; `SettingError`
    where the strength of an adapter names a layer that it does not change.
    """
    adapters = opened(adapters)
    find = bind(find_components, tables=tables, families=families)
    parts = [part.skeleton() for part in find(model)]
    widened: dict[str, dict[str, int]] = {}
    if widen:
        widened = {part.name: _widened(part, adapters) for part in parts}
    matcher = _Matcher(parts, widened)
    reports = []
    for slot, adapter in enumerate(adapters):
        report, paths = matcher.match(slot, adapter)
        reports.append(report)
        if not report.layers:
            raise CheckpointError(_complain(f"{adapter.name} fits nothing in this model", report))
        if report.unused and not partial:
            count = sum(len(patch.names) for patch in adapter.patches) + len(adapter.unread)
            header = f"{adapter.name}: {len(report.unused)} of {count} tensors cannot be applied"
            raise CheckpointError(_complain(header, report))
        adapter.strength.check(paths, adapter.name)
    hits = {name: tuple(found) for name, found in matcher.hits.items()}
    components = {part.name: part for part in parts}
    return Fitted(adapters, hits, widened, tuple(reports), components, find)


def _complain(header: str, report: Report) -> str:
    groups: dict[str, list[str]] = {}
    for tensor, why in report.unused.items():
        groups.setdefault(why, []).append(tensor)
    lines = [f"{line} {why}" for why, names in groups.items() for line in condense(names, names)]
    if len(lines) > MOST_REASONS:
        lines = [*lines[:MOST_REASONS], f"and {len(lines) - MOST_REASONS} more such lines"]
    return "\n  ".join([f"{header}:" if lines else f"{header}.", *lines])


def _widened(part: AdaptedComponent, adapters: Sequence[Adapter]) -> dict[str, int]:
    """The leaves of a component whose axis of inputs an adapter makes longer, and how long."""
    patches = [
        patch
        for adapter in adapters
        for patch in adapter.patches
        if patch.reshape is not None or adapter.format.widens
    ]
    if not patches:
        return {}
    wider: dict[str, int] = {}
    modules = _Modules([part], {part.name: part.module})
    for patch in patches:
        found, shape = modules.find(patch.module)[1], patch.shape
        if found is None or found.weight is None or shape is None or len(shape) != 2:
            continue
        own = found.weight.shape
        simple = len(found.weight.moves) == 1 and found.weight.moves[0].axes is None
        if simple and len(own) == 2 and shape[0] == own[0] and shape[1] > own[1]:
            leaf = found.weight.moves[0].leaf
            wider[leaf] = max(wider.get(leaf, 0), shape[1])
    return wider


def widen(module: Any, wider: Mapping[str, int]) -> Any:
    """Returns a component, or its skeleton, with zeros for inputs that its leaves do not have.

    **Arguments:**

    - `wider`: leaf -> the length that its last axis must have.
    """
    if not wider:
        return module
    flat, treedef = jax.tree_util.tree_flatten(module)
    paths = {id(leaf): path for path, leaf in leaf_paths(module).items()}
    out = []
    for leaf in flat:
        size = wider.get(paths.get(id(leaf), ""))
        if size is None:
            out.append(leaf)
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            out.append(jax.ShapeDtypeStruct((*leaf.shape[:-1], size), leaf.dtype))
        else:
            pad = [(0, 0)] * (leaf.ndim - 1) + [(0, size - leaf.shape[-1])]
            out.append(jax.numpy.pad(leaf, pad))
    return jax.tree_util.tree_unflatten(treedef, out)


class _Modules:
    """The modules of several components, under all their names in files."""

    def __init__(self, parts: Sequence[AdaptedComponent], skeletons: Mapping[str, Any]):
        self._indices = {p.name: LayerIndex(skeletons[p.name], p.tables) for p in parts}
        prefixes = [
            (text, flat, part.name)
            for part in parts
            for text, flat in prefixes_of(part.name, part.prefixes)
        ]
        self._prefixes = sorted(prefixes, key=lambda row: (-len(row[0]), row[1]))

    def find(self, module: str) -> tuple[str, LayoutModule | None]:
        """Returns the component and the module that a name of a file means.

        The longest prefix counts under which the model has such a module.
        """
        for prefix, flat, component in self._prefixes:
            if module.startswith(prefix):
                name = module.removeprefix(prefix)
                found = self._indices[component].find(name, flat=flat)
                if found is not None:
                    return component, found
        return "", None


class _Matcher:
    """Finds the modules of patches, and refuses two patches of one adapter for the same layer."""

    def __init__(self, parts: Sequence[AdaptedComponent], widened: Mapping[str, Mapping[str, int]]):
        self._wide = {part.name: widen(part.module, widened.get(part.name, {})) for part in parts}
        self._modules = _Modules(parts, self._wide)
        self._parts = {part.name: part for part in parts}
        self.hits: dict[str, list[Hit]] = {part.name: [] for part in parts}

    def match(self, slot: int, adapter: Adapter) -> tuple[Report, list[str]]:
        unused = dict(adapter.unread)
        taken: dict[tuple[str, str, int | None, int], Patch] = {}
        touched: dict[str, set[str]] = {}
        kinds: Counter[str] = Counter()
        layouts: Counter[str] = Counter()
        for patch in adapter.patches:
            component, found = self._modules.find(patch.module)
            hit, why = None, "is for a module that the model does not have"
            if found is not None:
                hit, why = _fit_one(slot, patch, found, self._wide[component])
            if hit is not None:
                rows = {
                    (component, move.leaf, move.layer, move.low)
                    for tensor in (hit.weight, hit.bias)
                    if tensor is not None
                    for move in tensor.moves
                }
                other = next((taken[row] for row in rows if row in taken), None)
                if other is not None and _same(other, patch):
                    continue  # a file may have a layer under the names of two layouts
                if other is not None:
                    hit, why = None, f"changes the same layer as {other.names[0]}"
                taken.update(dict.fromkeys(rows, patch))
            if hit is None:
                unused.update(dict.fromkeys(patch.names, why))
                continue
            self.hits[component].append(hit)
            kinds[patch.kind_name] += 1
            layouts[hit.module.layout] += 1
            touched.setdefault(component, set()).update(self._layers(component, hit))
        layers = {name: len(touched[name]) for name in self._parts if name in touched}
        names = tuple(layout for layout, _ in layouts.most_common())
        report = Report(adapter.name, adapter.format.name, layers, dict(kinds), names, unused)
        return report, [f"{name}.{path}" for name, paths in touched.items() for path in paths]

    def _layers(self, component: str, hit: Hit) -> set[str]:
        moves = [*(hit.weight.moves if hit.weight else ()), *(hit.bias.moves if hit.bias else ())]
        return {self._parts[component].layer_path(move) for move in moves}


def _same(one: Patch, two: Patch) -> bool:
    """Whether two patches make the same change."""
    same = (
        one.kind is two.kind and one.factor == two.factor and set(one.tensors) == set(two.tensors)
    )
    tensors = (one.read(), two.read()) if same else ({}, {})
    pairs = [(tensors[0][slot], tensors[1][slot]) for slot in tensors[0]]
    pairs += [(one.bias, two.bias), (one.magnitude, two.magnitude)]
    return same and all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs
    )


def _fit_one(slot: int, patch: Patch, found: LayoutModule, module: Any) -> tuple[Hit | None, str]:
    """A hit, or the reason why there is none."""
    weight = bias = None
    if patch.kind is not None:
        shape, weight = patch.shape, found.weight
        if weight is None or not weight.shape or shape is None:
            return None, "is for a module without a weight"
        flat = (weight.shape[0], math.prod(weight.shape[1:]))
        if shape != flat and _bare(shape) != _bare(weight.shape):
            return None, f"changes a weight of {shape}, which in the model is {weight.shape}"
        if patch.magnitude is not None:
            try:
                magnitude_axis(patch.magnitude.shape, weight.shape, by_rows=patch.by_rows)
            except ValueError as error:
                return None, f"has {error}"
    if patch.bias is not None:
        bias = found.bias or _absent_bias(found.weight, module)
        if bias is None:
            return None, "is for a module that cannot have a bias"
        if patch.bias.size != math.prod(bias.shape):
            return None, f"changes a bias of {patch.bias.shape}, which in the model is {bias.shape}"
    return Hit(slot, patch, found, weight, bias), ""


def _absent_bias(weight: LayoutTensor | None, module: Any) -> LayoutTensor | None:
    """The bias that a layer without one can be given: its rows are those of the weight."""
    if weight is None or any(move.axes is not None for move in weight.moves):
        return None
    layers = [follow(module, move.leaf.split(".")[:-1]) for move in weight.moves]
    if not all(isinstance(layer, Linear | Conv2d) for layer in layers):
        return None
    name = lambda path: f"{path.rpartition('.')[0]}.bias"
    moves = tuple(
        dataclasses.replace(
            move,
            tensor=name(move.tensor),
            leaf=name(move.leaf),
            theirs=(move.stop - move.start,),
            between=(move.stop - move.start,),
            ours=(move.high - move.low,),
        )
        for move in weight.moves
    )
    return LayoutTensor(name(weight.name), weight.shape[:1], moves)


def _bare(shape: Shape) -> Shape:
    """A shape without the axes of length 1 at its end: a matrix is a convolution of size 1x1."""
    shape = tuple(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
