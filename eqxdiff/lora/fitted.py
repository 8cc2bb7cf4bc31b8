"""Adapters tied to a model: the places of their patches, and the changes that these make there."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..checkpoint.plan import Move, Shape
from ..tensors.source import Box
from .adapter import Adapter, Patch
from .components import AdaptedComponent
from .index import LayoutModule, LayoutTensor
from .kinds import Rows, decompose, magnitude_axis


ReadLeaf = Callable[[str, Box], np.ndarray]
"""Returns a box of a leaf of the model without adapters: `read(path, box)`."""

CHUNK_ELEMENTS = 1 << 20
"""Changes are computed in runs of rows with about this many numbers, which stay in the cache."""


@dataclasses.dataclass(frozen=True, eq=False)
class Hit:
    """A patch and the module that it changes.

    **Fields:**

    - `slot`: the number of the adapter.
    - `weight`, `bias`: the tensors that it changes, in the file's layout.
    """

    slot: int
    patch: Patch
    module: LayoutModule
    weight: LayoutTensor | None
    bias: LayoutTensor | None

    def change(self, read: ReadLeaf, gain: np.ndarray | None = None) -> Rows:
        """Returns the rows of the weight's change, in the file's layout, at strength 1 in float32.

        **Arguments:**

        - `read`: reads the weights as they were, which a DoRA and a replaced weight depend on.
        - `gain`: the result of `gain`, where it is known already.
        """
        patch, tensor = self.patch, self.weight
        assert patch.kind is not None
        assert tensor is not None
        rows, factor = patch.kind.delta(patch.read()), np.float32(patch.factor)
        own = lambda start, stop: rows(start, stop).reshape(-1, *tensor.shape[1:]) * factor
        base = lambda start, stop: gather(tensor, read, start, stop)
        if patch.kind.name == "set":
            return lambda start, stop: own(start, stop) - base(start, stop)
        if patch.magnitude is None:
            return own
        gain = self.gain(read) if gain is None else gain

        def decomposed(start: int, stop: int) -> np.ndarray:
            weight = base(start, stop)
            part = gain[start:stop] if gain.shape[0] > 1 else gain
            return (weight + own(start, stop)) * part - weight

        return decomposed

    def gain(self, read: ReadLeaf) -> np.ndarray:
        """Returns the factors of a DoRA, with an axis for each of the weight's."""
        patch, tensor = self.patch, self.weight
        assert patch.kind is not None
        assert patch.magnitude is not None
        assert tensor is not None
        rows, factor = patch.kind.delta(patch.read()), np.float32(patch.factor)
        axis = self.gain_axis
        magnitude = patch.magnitude.reshape(-1)
        count = tensor.shape[0]
        gains = []
        for start, stop in chunks(tensor.shape) if axis == 0 else [(0, count)]:
            weight = gather(tensor, read, start, stop)
            delta = rows(start, stop).reshape(weight.shape) * factor
            part = magnitude[start:stop] if axis == 0 else magnitude
            gains.append(decompose(weight, delta, part, axis))
        shape = [-1 if i == axis else 1 for i in range(len(tensor.shape))]
        return np.concatenate(gains).reshape(shape)

    @property
    def gain_axis(self) -> int:
        """The axis of the weight along which the magnitudes of a DoRA lie."""
        assert self.patch.magnitude is not None
        assert self.weight is not None
        shape = self.patch.magnitude.shape
        return magnitude_axis(shape, self.weight.shape, by_rows=self.patch.by_rows)


def chunks(shape: Shape) -> Iterator[tuple[int, int]]:
    """Cuts the rows of an array into runs of about `CHUNK_ELEMENTS` numbers."""
    step = max(CHUNK_ELEMENTS // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def is_plain(move: Move) -> bool:
    """Whether each row of the leaf is a row of the file's tensor."""
    return move.axes is None and move.theirs[:1] == move.between[:1]


def gather(tensor: LayoutTensor, read: ReadLeaf, start: int, stop: int) -> np.ndarray:
    """Returns rows of a layout's tensor, in float32, from the leaves of the model."""
    out = np.empty((stop - start, *tensor.shape[1:]), np.float32)
    for move in tensor.moves:
        first, last = max(start, move.start), min(stop, move.stop)
        if first >= last:
            continue
        low, high = (first, last) if is_plain(move) else (move.start, move.stop)
        shift = move.low - move.start
        box = ((low + shift, high + shift) if is_plain(move) else (move.low, move.high),)
        box += tuple((0, size) for size in move.ours[1:])
        if move.layer is None:
            rows = read(move.leaf, box)
        else:
            rows = read(move.leaf, ((move.layer, move.layer + 1), *box))[0]
        rows = _part(move, high - low).to_theirs(np.asarray(rows).astype(np.float32))
        out[first - start : last - start] = rows[first - low : last - low]
    return out


def scatter(move: Move, rows: np.ndarray) -> np.ndarray:
    """Returns the rows of a leaf that a move makes of rows of a change in the file's layout.

    **Arguments:**

    - `rows`: some of the move's rows if it is plain, else all of them.
    """
    rows = rows.reshape(_part(move, rows.shape[0]).between)
    if move.axes is not None:
        rows = rows.transpose(move.axes)
    return rows if move.scale is None else rows * np.float32(move.scale)


def _part(move: Move, count: int) -> Move:
    """The move of `count` of its rows."""
    if not is_plain(move) or count == move.stop - move.start:
        return move
    return dataclasses.replace(
        move, theirs=(count, *move.theirs[1:]), between=(count, *move.between[1:])
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """The effect of an adapter on a model.

    **Fields:**

    - `layers`: the number of layers of each component that it changes.
    - `kinds`: the number of patches of each kind.
    - `layouts`: the layouts that its names belong to.
    - `unused`: tensor -> the reason why it is not applied.
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
    """Adapters and the places of their patches in a model. It holds no weights.

    **Fields:**

    - `hits`: by component.
    - `widened`: by component, the leaves whose last axis becomes longer, and its length.
    - `reports`: one for each adapter.
    - `components`: the skeletons of the components, by name.
    - `find`: finds the components of a model of the same classes.
    """

    adapters: tuple[Adapter, ...]
    hits: Mapping[str, tuple[Hit, ...]]
    widened: Mapping[str, Mapping[str, int]]
    reports: tuple[Report, ...]
    components: Mapping[str, AdaptedComponent]
    find: Callable[[Any], list[AdaptedComponent]]

    def record(self) -> list[dict[str, Any]]:
        """Returns what is worth keeping with a picture: files, strengths and touched layers."""
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
