"""Filling layers with adapters at run time: arrays of a structure that others will fit too."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._errors import SettingError
from ..checkpoint import leaf_paths
from ..checkpoint.load import dotted
from ..checkpoint.plan import Move, Shape
from ..nn import Adapted, Conv2d, Linear
from .components import AdaptedComponent, follow, path_of
from .fit import widen
from .fitted import Fitted, Hit, gather, is_plain, scatter
from .kinds import decompose
from .merge import reader_of
from .merger import put_beside, with_leaves
from .strength import Strength, matches


FEWEST_RANKS = 4
"""Room for ranks is a power of two, and no less than this."""


@dataclasses.dataclass(frozen=True)
class Room:
    """The adapters that an `Adapted` has room for; `rank` is 0 without factors."""

    slots: int
    rank: int = 0
    rows: bool = False
    columns: bool = False
    change: bool = False
    bias_change: bool = False

    @classmethod
    def of(cls, node: Adapted) -> "Room":
        rank = 0 if node.up is None else node.up.shape[-1]
        has = (x is not None for x in (node.rows, node.columns, node.change, node.bias_change))
        return cls(node.scale.shape[-1], rank, *has)

    def union(self, other: "Room") -> "Room":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Room(*(max(pair) for pair in pairs))

    def at_least(self, rank: int) -> "Room":
        """Returns a room for at least so many ranks, a power of two; none where it has none."""
        most = max(self.rank, rank, FEWEST_RANKS)
        return dataclasses.replace(self, rank=1 << (most - 1).bit_length() if self.rank else 0)


@dataclasses.dataclass(eq=False)
class _LayerChange:
    """The change that one adapter makes to one layer."""

    ups: list[np.ndarray] = dataclasses.field(default_factory=list)
    downs: list[np.ndarray] = dataclasses.field(default_factory=list)
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    change: np.ndarray | None = None
    bias_change: np.ndarray | None = None

    @property
    def room(self) -> Room:
        rank = sum(up.shape[1] for up in self.ups)
        vectors = self.rows, self.columns, self.change, self.bias_change
        return Room(0, rank, *(vector is not None for vector in vectors))


class Filler:
    """Fills one component with adapters."""

    def __init__(self, part: AdaptedComponent, fitted: Fitted):
        self._name = part.name
        self._module = widen(part.module, fitted.widened.get(part.name, {}))
        self._leaves = leaf_paths(self._module)
        self._read = reader_of(self._leaves)
        self._depth = part.depth
        self._strengths = [adapter.strength for adapter in fitted.adapters]
        self._names = [adapter.name for adapter in fitted.adapters]
        self._changes: dict[str, dict[tuple[int | None, int], _LayerChange]] = {}
        for hit in fitted.hits[part.name]:
            self._add(hit)

    def rooms(self) -> dict[str, Room]:
        """Returns the room that each touched layer needs."""
        rooms = {}
        for path, changes in self._changes.items():
            room = Room(len(self._strengths))
            for change in changes.values():
                room = room.union(change.room)
            rooms[path] = room.at_least(0)
        return rooms

    def layers(self, patterns: Sequence[str]) -> list[str]:
        """Returns the paths of the matrices and convolutions that match a pattern."""
        is_layer = lambda node: isinstance(node, Linear | Conv2d)
        found = []
        for path, node in jax.tree_util.tree_flatten_with_path(self._module, is_leaf=is_layer)[0]:
            whole = f"{self._name}.{dotted(path)}"
            if is_layer(node) and any(matches(pattern, whole) for pattern in patterns):
                found.append(dotted(path))
        return found

    def check(self, rooms: Mapping[str, Room]) -> None:
        """**Raises:** `SettingError` where there is no room for these adapters."""
        for path, need in self.rooms().items():
            room = rooms.get(path)
            if room is None or need.union(room) != room:
                raise SettingError(
                    f"There is no room for {', '.join(self._names)} in {self._name}.{path}: "
                    "remove the adapters and apply these instead, or reserve more room."
                )

    def fill(self, rooms: Mapping[str, Room]) -> Any:
        """Returns the component with an `Adapted` at each of these paths."""
        return with_leaves(
            self._module, {path: self._adapted(path, room) for path, room in rooms.items()}
        )

    def _adapted(self, path: str, room: Room) -> Adapted:
        inner = follow(self._module, path.split("."))
        depth = self._depth(f"{path}.weight")
        shape = tuple(self._leaves[f"{path}.weight"].shape)
        lead, shape = (shape[:1], shape[1:]) if depth is not None else ((), shape)
        layers = lead[0] if lead else None
        n, rest = room.slots, int(np.prod(shape[1:]))
        arrays: dict[str, np.ndarray] = {
            "scale": scales_of(self._name, path, depth, layers, n, self._strengths)
        }

        def make(name: str, wanted: Any, *sizes: int) -> None:
            if wanted:
                arrays[name] = np.zeros((*lead, *sizes), np.float32)

        make("down", room.rank, n, room.rank, rest)
        make("up", room.rank, shape[0], n, room.rank)
        make("rows", room.rows, n, shape[0])
        make("columns", room.columns, n, *shape[1:2])
        make("change", room.change, n, *shape)
        make("bias_change", room.bias_change, n, shape[0])
        for (layer, slot), change in self._changes.get(path, {}).items():
            own = {name: a if layer is None else a[layer] for name, a in arrays.items()}
            if change.ups:
                up, down = np.concatenate(change.ups, 1), np.concatenate(change.downs)
                own["up"][:, slot, : up.shape[1]] = up
                own["down"][slot, : down.shape[0]] = down
            for name in ("rows", "columns", "change", "bias_change"):
                value = vars(change)[name]
                if value is not None:
                    own[name][slot] = value
        weight = self._leaves[f"{path}.weight"]
        spec = lambda name, array: _spec_of_change(array, weight) if name == "change" else None
        placed = {n: put_beside(a, weight, spec(n, a)) for n, a in arrays.items()}
        return Adapted(inner, **placed)

    # --- the change that each patch makes to each layer ---

    def _at(self, move: Move, slot: int) -> _LayerChange:
        path = move.leaf.rpartition(".")[0]
        return self._changes.setdefault(path, {}).setdefault((move.layer, slot), _LayerChange())

    def _shape(self, move: Move) -> Shape:
        return tuple(self._leaves[move.leaf].shape)[(move.layer is not None) :]

    def _add(self, hit: Hit) -> None:
        if hit.patch.bias is not None and hit.bias is not None:
            bias = hit.patch.bias.reshape(-1)
            for move in hit.bias.moves:
                change = self._at(move, hit.slot)
                weight = self._leaves[f"{move.leaf.rpartition('.')[0]}.weight"]
                rows = np.zeros(weight.shape[move.layer is not None], np.float32)
                rows[move.low : move.high] = scatter(move, bias[move.start : move.stop])
                old = change.bias_change
                change.bias_change = rows if old is None else old + rows
        if hit.weight is None or hit.patch.kind is None:
            return
        factors = hit.patch.kind.factors(hit.patch.read())
        moves = hit.weight.moves
        if factors is None or not all(self._is_low_rank(hit, move) for move in moves):
            self._add_change(hit)
        else:
            self._add_factors(hit, *factors)

    def _is_low_rank(self, hit: Hit, move: Move) -> bool:
        """Whether factors of the file's tensor are factors of the leaf's rows too."""
        module = follow(self._module, move.leaf.split(".")[:-1])
        whole = hit.patch.magnitude is None or (move.low == 0 and move.high == self._shape(move)[0])
        return isinstance(module, Linear | Conv2d) and is_plain(move) and whole

    def _add_change(self, hit: Hit) -> None:
        assert hit.weight is not None
        delta = hit.change(self._read)(0, hit.weight.shape[0])
        for move in hit.weight.moves:
            change = self._at(move, hit.slot)
            if change.change is None:
                change.change = np.zeros(self._shape(move), np.float32)
            change.change[move.low : move.high] += scatter(move, delta[move.start : move.stop])

    def _add_factors(self, hit: Hit, up: np.ndarray, down: np.ndarray) -> None:
        assert hit.weight is not None
        up, rows, columns = up * np.float32(hit.patch.factor), None, None
        if hit.patch.magnitude is not None:
            weight = gather(hit.weight, self._read, 0, hit.weight.shape[0])
            delta = (up @ down).reshape(weight.shape)
            gain = decompose(weight, delta, hit.patch.magnitude, hit.gain_axis)
            if hit.gain_axis == 0:
                up, rows = up * gain[:, None], gain - 1
            else:
                wide = down.reshape(down.shape[0], weight.shape[1], -1) * gain[:, None]
                down, columns = wide.reshape(down.shape), gain - 1
        own: dict[int, np.ndarray] = {}
        for move in hit.weight.moves:
            change = self._at(move, hit.slot)
            if id(change) not in own:  # parts of one tensor share its ranks
                own[id(change)] = np.zeros((self._shape(move)[0], up.shape[1]), np.float32)
                change.ups.append(own[id(change)])
                change.downs.append(down)
            scale = np.float32(1 if move.scale is None else move.scale)
            own[id(change)][move.low : move.high] += scale * up[move.start : move.stop]
            if rows is not None:
                change.rows = rows[move.start : move.stop]
            if columns is not None:
                change.columns = columns


def scales_of(
    component: str,
    path: str,
    depth: int | None,
    layers: int | None,
    slots: int,
    strengths: Sequence[Strength],
) -> np.ndarray:
    """Returns the scale of each slot, in each layer of a stack. Empty slots have the scale 0."""
    leaf = f"{path}.weight"
    rows = []
    for layer in [None] if layers is None else range(layers):
        name = f"{component}.{path_of(leaf, depth, layer)}".rpartition(".")[0]
        row = [strength.at(name) for strength in strengths]
        rows.append(row + [0.0] * (slots - len(row)))
    return np.array(rows[0] if layers is None else rows, np.float32)


def _spec_of_change(change: np.ndarray, weight: Any) -> PartitionSpec | None:
    """Spreads the change of a weight over its devices as the weight itself is spread."""
    if not isinstance(weight, jax.Array) or not isinstance(weight.sharding, NamedSharding):
        return None
    own = (*weight.sharding.spec, *[None] * weight.ndim)[: weight.ndim]
    lead = change.ndim - weight.ndim
    at = 1 if change.shape[0] == weight.shape[0] and lead and change.ndim > 3 else 0
    return PartitionSpec(*own[:at], *[None] * lead, *own[at:])
