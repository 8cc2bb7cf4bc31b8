"""Adapters fitted to a model: each patch to the module that it is for, or the reason why not."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._errors import CheckpointError
from ..checkpoint import Table, leaf_paths
from ..checkpoint.plan import Move, Shape, condense
from ..nn import Conv2d, Linear
from .adapter import Adapter, Patch
from .formats import PREFIXES
from .index import Index, Site, Target, Tensor, find_targets, follow, path_of
from .kinds import decompose, magnitude_axis


MOST_REASONS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Hit:
    """A patch and the module that it is for.

    **Fields:**

    - `slot`: the number of the adapter.
    - `weight`, `bias`: the tensors that it changes, in the file's layout.
    """

    slot: int
    patch: Patch
    site: Site
    weight: Tensor | None
    bias: Tensor | None

    def delta(self, leaves: Mapping[str, Any]) -> np.ndarray | None:
        """The change of the weight, in the layout of the file, at strength 1 and in float32.

        **Arguments:**

        - `leaves`: of the component, where a DoRA's or a replaced weight is looked up.
        """
        patch, tensor = self.patch, self.weight
        if patch.kind is None or tensor is None:
            return None
        delta = patch.kind.delta(patch.tensors).reshape(tensor.shape) * np.float32(patch.factor)
        if patch.kind.name == "set":
            return delta - gather(tensor, leaves)
        if patch.magnitude is None:
            return delta
        weight = gather(tensor, leaves)
        gain, axis = self.gain(weight, delta)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        return (weight + delta) * gain.reshape(shape) - weight

    def gain(self, weight: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, int]:
        """What a DoRA multiplies each row or column by, and the axis that these lie along."""
        magnitude = self.patch.magnitude
        assert magnitude is not None
        axis = magnitude_axis(magnitude.shape, weight.shape, by_rows=self.patch.by_rows)
        return decompose(weight, delta, magnitude, axis), axis


@dataclasses.dataclass(frozen=True)
class Report:
    """What an adapter does to a model.

    **Fields:**

    - `layers`: how many layers of each component it touches.
    - `kinds`: how many patches there are of each kind.
    - `layouts`: the layouts that its names are of.
    - `unused`: tensor -> why it is not applied.
    """

    name: str
    format: str
    layers: Mapping[str, int]
    kinds: Mapping[str, int]
    layouts: tuple[str, ...]
    unused: Mapping[str, str]

    def __str__(self) -> str:
        touched = ", ".join(f"{count} of {name}" for name, count in self.layers.items())
        kinds = ", ".join(self.kinds)
        text = f"{self.name} ({self.format}: {kinds}) changes layers: {touched or 'none'}"
        return f"{text}; {len(self.unused)} tensors are not applied" if self.unused else text


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """Adapters and where each of their patches goes.

    **Fields:**

    - `hits`: by component.
    - `widened`: by component, the leaves with a longer axis 1 than the model has.
    - `reports`: one for each adapter.
    """

    adapters: tuple[Adapter, ...]
    hits: Mapping[str, tuple[Hit, ...]]
    widened: Mapping[str, Mapping[str, int]]
    reports: tuple[Report, ...]

    def record(self) -> list[dict[str, Any]]:
        """What is worth keeping with a picture: the files, their strengths, what they touched."""
        return [
            {
                "name": adapter.name,
                "sha256": adapter.sha256,
                "strength": str(adapter.strength),
                "layers": dict(report.layers),
                "unused": len(report.unused),
            }
            for adapter, report in zip(self.adapters, self.reports, strict=True)
        ]


def fit(
    model: Any,
    adapters: Adapter | Sequence[Adapter],
    *,
    partial: bool = False,
    widen: bool = True,
    tables: Sequence[Table] | None = None,
) -> Fitted:
    """Finds the modules that adapters are for, by names and shapes alone.

    **Arguments:**

    - `model`: a pipeline, a dictionary of components by name, or one; skeletons will do.
    - `partial`: accept tensors that cannot be applied, which the reports list.
    - `widen`: let an adapter that is made so give a layer more inputs.
    - `tables`: the layouts of a model of no known family.

    **Raises:** `CheckpointError` where a tensor cannot be applied, or none can; `SettingError`
    where the strength of an adapter names what it does not touch.
    """
    adapters = (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    parts = find_targets(model, tables)
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
    return Fitted(adapters, hits, widened, tuple(reports))


def _complain(header: str, report: Report) -> str:
    groups: dict[str, list[str]] = {}
    for tensor, why in report.unused.items():
        groups.setdefault(why, []).append(tensor)
    lines = [f"{line} {why}" for why, names in groups.items() for line in condense(names, names)]
    if len(lines) > MOST_REASONS:
        lines = [*lines[:MOST_REASONS], f"and {len(lines) - MOST_REASONS} more such lines"]
    return "\n  ".join([f"{header}:" if lines else f"{header}.", *lines])


def _widened(part: Target, adapters: Sequence[Adapter]) -> dict[str, int]:
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
    indices = {part.name: Index(part.module, part.tables)}
    for patch in patches:
        site, shape = _find(indices, patch.module)[1], patch.shape
        if site is None or site.weight is None or shape is None or len(shape) != 2:
            continue
        own = site.weight.shape
        simple = len(site.weight.moves) == 1 and site.weight.moves[0].axes is None
        if simple and len(own) == 2 and shape[0] == own[0] and shape[1] > own[1]:
            leaf = site.weight.moves[0].leaf
            wider[leaf] = max(wider.get(leaf, 0), shape[1])
    return wider


def widen(module: Any, wider: Mapping[str, int]) -> Any:
    """A component, or its skeleton, with zeros for the inputs that leaves do not have yet."""
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


def _find(indices: Mapping[str, Index], module: str) -> tuple[str, Site | None]:
    """The component and module that a name of a file means."""
    for prefix in PREFIXES:
        if not module.startswith(prefix.text):
            continue
        for component in (*prefix.components, *(name for name in indices if name == "model")):
            if component in indices:
                name = module.removeprefix(prefix.text)
                site = indices[component].find(name, flat=prefix.flat)
                if site is not None:
                    return component, site
    return "", None


class _Matcher:
    """Finds what patches are for, and refuses two patches of one adapter for the same layer."""

    def __init__(self, parts: Sequence[Target], widened: Mapping[str, Mapping[str, int]]):
        wide = {part.name: widen(part.module, widened.get(part.name, {})) for part in parts}
        self._modules = wide
        self._indices = {part.name: Index(wide[part.name], part.tables) for part in parts}
        self._parts = {part.name: part for part in parts}
        self.hits: dict[str, list[Hit]] = {part.name: [] for part in parts}

    def match(self, slot: int, adapter: Adapter) -> tuple[Report, list[str]]:
        unused = dict(adapter.unread)
        taken: dict[tuple[str, str, int | None, int], Patch] = {}
        touched: dict[str, set[str]] = {}
        kinds: Counter[str] = Counter()
        layouts: Counter[str] = Counter()
        for patch in adapter.patches:
            component, site = _find(self._indices, patch.module)
            hit, why = None, "is for a module that the model does not have"
            if site is not None:
                hit, why = _fit_one(slot, patch, site, self._modules[component])
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
            layouts[hit.site.layout] += 1
            touched.setdefault(component, set()).update(self._layers(component, hit))
        layers = {name: len(touched[name]) for name in self._indices if name in touched}
        names = tuple(layout for layout, _ in layouts.most_common())
        report = Report(adapter.name, adapter.format.name, layers, dict(kinds), names, unused)
        return report, [f"{name}.{path}" for name, paths in touched.items() for path in paths]

    def _layers(self, component: str, hit: Hit) -> set[str]:
        depth = self._parts[component].depth
        moves = [*(hit.weight.moves if hit.weight else ()), *(hit.bias.moves if hit.bias else ())]
        return {layer_path(move, depth(move.leaf)) for move in moves}


def layer_path(move: Move, depth: int | None) -> str:
    """The path of the layer that a move fills a part of: `blocks.7.attn.to_q`."""
    return path_of(move.leaf, depth, move.layer).rpartition(".")[0]


def _same(one: Patch, two: Patch) -> bool:
    same = (
        one.kind is two.kind and one.factor == two.factor and set(one.tensors) == set(two.tensors)
    )
    pairs = [(one.tensors[slot], two.tensors[slot]) for slot in one.tensors] if same else []
    pairs += [(one.bias, two.bias), (one.magnitude, two.magnitude)]
    return same and all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs
    )


def _fit_one(slot: int, patch: Patch, site: Site, module: Any) -> tuple[Hit | None, str]:
    """A hit, or why there is none."""
    weight = bias = None
    if patch.kind is not None:
        shape, weight = patch.shape, site.weight
        if weight is None or shape is None:
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
        bias = site.bias or _absent_bias(site.weight, module)
        if bias is None:
            return None, "is for a module that cannot have a bias"
        if patch.bias.size != math.prod(bias.shape):
            return None, f"changes a bias of {patch.bias.shape}, which in the model is {bias.shape}"
    return Hit(slot, patch, site, weight, bias), ""


def _absent_bias(weight: Tensor | None, module: Any) -> Tensor | None:
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
    return Tensor(name(weight.name), weight.shape[:1], moves)


def _bare(shape: Shape) -> Shape:
    """Without the axes of length 1 at the end, which a matrix and a 1x1 convolution differ in."""
    shape = tuple(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def gather(tensor: Tensor, leaves: Mapping[str, Any]) -> np.ndarray:
    """A tensor of a layout, in float32, from the leaves of the model."""
    out = np.empty(tensor.shape, np.float32)
    for move in tensor.moves:
        leaf = leaves[move.leaf] if move.layer is None else leaves[move.leaf][move.layer]
        rows = np.asarray(leaf[move.low : move.high]).astype(np.float32)
        out[move.start : move.stop] = move.to_theirs(rows)
    return out


def scatter(move: Move, delta: np.ndarray) -> np.ndarray:
    """The rows of a leaf that a move makes of a change in the layout of the file."""
    rows = delta[move.start : move.stop].reshape(move.between)
    if move.axes is not None:
        rows = rows.transpose(move.axes)
    return rows if move.scale is None else rows * np.float32(move.scale)
