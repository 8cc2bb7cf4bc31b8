"""Adapters at run time: leaves of low rank beside the weights, so that nothing is compiled anew
when an adapter or its scale changes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._errors import SettingError
from ..checkpoint import Table, leaf_paths
from ..checkpoint.load import dotted
from ..checkpoint.plan import Move, Shape
from ..nn import Adapted, Conv2d, Linear
from .adapter import Adapter
from .fit import Fitted, Hit, fit, gather, scatter, widen
from .index import Target, find_targets, follow, path_of
from .merge import check_plain, is_adapted, replace_parts
from .strength import Strength, matches


Model = TypeVar("Model")

FEWEST_RANKS = 4
"""Room for ranks is a power of two, and no less than this."""


def apply(
    model: Model,
    adapters: Adapter | Sequence[Adapter],
    *,
    partial: bool = False,
    rank: int = 0,
    reserve: Sequence[str] = (),
    tables: Sequence[Table] | None = None,
) -> Model:
    """The model with adapters beside its weights: each layer that they touch becomes an `Adapted`.

    Adapters that touch the same layers with ranks of the same power of two make models of the same
    structure, for which a compiled function need not be compiled again. `swap` puts others in
    their place, `rescale` changes their strengths, and `remove` takes them away.

    **Arguments:** as of `fit`, and

    - `rank`: make room for this many ranks of an adapter in a layer, for those that come later.
    - `reserve`: make room in the matrices and convolutions whose path begins so, even where no
      adapter touches them: `("transformer",)` for all of a component.

    **Raises:** as `fit`; `SettingError` where the model has adapters already.
    """
    fitted = fit(model, adapters, partial=partial, tables=tables)
    return apply_fitted(model, fitted, rank=rank, reserve=reserve, tables=tables)


def apply_fitted(
    model: Model,
    fitted: Fitted,
    *,
    rank: int = 0,
    reserve: Sequence[str] = (),
    tables: Sequence[Table] | None = None,
) -> Model:
    """As `apply`, for adapters that are fitted already, perhaps to more components than these."""
    parts = [part for part in find_targets(model, tables) if part.name in fitted.hits]
    new = []
    for part in parts:
        check_plain(part.module, "Applying adapters")
        filler = _Filler(part, fitted)
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
    adapters: Adapter | Sequence[Adapter],
    *,
    partial: bool = False,
    tables: Sequence[Table] | None = None,
) -> Model:
    """A model with adapters at run time with others in their place, and of the same structure.

    **Arguments:** as of `fit`.

    **Raises:** as `fit`; `SettingError` where there is no room for them, which `remove` and then
    `apply` would make.
    """
    plain = remove(model)
    fitted = fit(plain, adapters, partial=partial, widen=False, tables=tables)
    olds = find_targets(model, tables)
    parts, new = [], []
    for part, old in zip(find_targets(plain, tables), olds, strict=True):
        rooms = {path: Room.of(node) for path, node in adapted_layers(old.module)}
        if rooms or fitted.hits.get(part.name):
            filler = _Filler(part, fitted)
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
    """The model with its adapters, in their order, at other strengths.

    **Raises:** `SettingError` where there are fewer slots than strengths.
    """
    rules = [Strength.make(strength) for strength in strengths]
    parts = [part for part in find_targets(model, tables) if any(adapted_layers(part.module))]
    new = []
    for part in parts:
        paths, scales = [], []
        for path, node in adapted_layers(part.module):
            slots = node.scale.shape[-1]
            if len(rules) > slots:
                raise SettingError(f"{len(rules)} strengths are given for {slots} adapters.")
            layers = node.scale.shape[0] if node.scale.ndim == 2 else None
            paths.append(path)
            scale = _scales(part.name, path, part.depth(f"{path}.weight"), layers, slots, rules)
            scales.append(_place(scale, node.inner))
        where: Callable[[Any], list[Any]]
        where = lambda m, paths=paths: [follow(m, path.split(".")).scale for path in paths]
        new.append(eqx.tree_at(where, part.module, scales))
    return replace_parts(model, parts, new)


def remove(model: Model) -> Model:
    """The model without its adapters at run time."""
    inner = lambda node: node.inner if isinstance(node, Adapted) else node
    return jax.tree.map(inner, model, is_leaf=is_adapted)


def adapter_leaves(model: Any) -> Any:
    """`True` for the arrays of adapters at run time and `False` for all else, as a PyTree.

    `eqx.partition(model, adapter_leaves(model))` parts what a fine-tuning trains.
    """

    def mark(node: Any) -> Any:
        if not isinstance(node, Adapted):
            return False
        own = jax.tree.map(lambda _: True, node)
        return eqx.tree_at(lambda n: n.inner, own, jax.tree.map(lambda _: False, node.inner))

    return jax.tree.map(mark, model, is_leaf=is_adapted)


def ensemble(
    model: Model,
    adapters: Sequence[Adapter | Sequence[Adapter]],
    *,
    partial: bool = False,
    tables: Sequence[Table] | None = None,
) -> tuple[Model, Any]:
    """One model with a stack of adapters, of which each is a member of an ensemble.

    **Returns:** the model, in which the leaves of adapters have a leading axis of members, and the
    axes of its leaves for `eqx.filter_vmap(f, in_axes=(axes, ...))`. The weights are not copied.

    **Arguments:** as of `fit`, with one adapter or several for each member.
    """
    all_fitted = [fit(model, one, partial=partial, widen=False, tables=tables) for one in adapters]
    members = []
    parts = find_targets(model, tables)
    for part in parts:
        fillers = [_Filler(part, fitted) for fitted in all_fitted]
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
    """The layers of a component with adapters at run time, and their paths."""
    for path, node in jax.tree_util.tree_flatten_with_path(module, is_leaf=is_adapted)[0]:
        if isinstance(node, Adapted):
            yield dotted(path), node


@dataclasses.dataclass(frozen=True)
class Room:
    """What an `Adapted` has room for; `rank` is 0 without factors."""

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
        """With room for more ranks, where there is room for some; a power of two."""
        most = max(self.rank, rank, FEWEST_RANKS)
        return dataclasses.replace(self, rank=1 << (most - 1).bit_length() if self.rank else 0)


@dataclasses.dataclass(eq=False)
class _Change:
    """What one adapter does to one layer."""

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


class _Filler:
    """Fills one component with adapters."""

    def __init__(self, part: Target, fitted: Fitted):
        self._name = part.name
        self._module = widen(part.module, fitted.widened.get(part.name, {}))
        self._leaves = leaf_paths(self._module)
        self._depth = part.depth
        self._strengths = [adapter.strength for adapter in fitted.adapters]
        self._names = [adapter.name for adapter in fitted.adapters]
        self._changes: dict[str, dict[tuple[int | None, int], _Change]] = {}
        for hit in fitted.hits[part.name]:
            self._add(hit)

    def rooms(self) -> dict[str, Room]:
        """What each layer that is touched needs room for."""
        rooms = {}
        for path, changes in self._changes.items():
            room = Room(len(self._strengths))
            for change in changes.values():
                room = room.union(change.room)
            rooms[path] = room.at_least(0)
        return rooms

    def layers(self, patterns: Sequence[str]) -> list[str]:
        """The paths of matrices and convolutions that match."""
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
        """The component with an `Adapted` at each of these paths."""
        if not rooms:
            return self._module
        paths = list(rooms)
        where = lambda m: [follow(m, path.split(".")) for path in paths]
        return eqx.tree_at(
            where, self._module, [self._adapted(path, rooms[path]) for path in paths]
        )

    def _adapted(self, path: str, room: Room) -> Adapted:
        inner = follow(self._module, path.split("."))
        depth = self._depth(f"{path}.weight")
        shape = tuple(self._leaves[f"{path}.weight"].shape)
        lead, shape = (shape[:1], shape[1:]) if depth is not None else ((), shape)
        layers = lead[0] if lead else None
        n, rest = room.slots, int(np.prod(shape[1:]))
        arrays: dict[str, np.ndarray] = {
            "scale": _scales(self._name, path, depth, layers, n, self._strengths)
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
        return Adapted(inner, **{name: _place(a, inner, name) for name, a in arrays.items()})

    # --- what each patch does to each layer ---

    def _at(self, move: Move, slot: int) -> _Change:
        path = move.leaf.rpartition(".")[0]
        return self._changes.setdefault(path, {}).setdefault((move.layer, slot), _Change())

    def _shape(self, move: Move) -> Shape:
        return tuple(self._leaves[move.leaf].shape)[(move.layer is not None) :]

    def _add(self, hit: Hit) -> None:
        if hit.patch.bias is not None and hit.bias is not None:
            for move in hit.bias.moves:
                change = self._at(move, hit.slot)
                weight = self._leaves[f"{move.leaf.rpartition('.')[0]}.weight"]
                rows = np.zeros(weight.shape[move.layer is not None], np.float32)
                rows[move.low : move.high] = scatter(move, hit.patch.bias.reshape(-1))
                old = change.bias_change
                change.bias_change = rows if old is None else old + rows
        if hit.weight is None or hit.patch.kind is None:
            return
        factors = hit.patch.kind.factors(hit.patch.tensors)
        moves = hit.weight.moves
        if factors is None or not all(self._is_low_rank(hit, move) for move in moves):
            self._add_change(hit)
        else:
            self._add_factors(hit, *factors)

    def _is_low_rank(self, hit: Hit, move: Move) -> bool:
        """Whether factors of the file's tensor are factors of what a move makes of it."""
        module = follow(self._module, move.leaf.split(".")[:-1])
        plain = move.axes is None and move.theirs[:1] == move.between[:1]
        whole = (move.low, move.high) == (0, self._shape(move)[0])
        return (
            isinstance(module, Linear | Conv2d) and plain and (hit.patch.magnitude is None or whole)
        )

    def _add_change(self, hit: Hit) -> None:
        delta = hit.delta(self._leaves)
        assert delta is not None
        assert hit.weight is not None
        for move in hit.weight.moves:
            change = self._at(move, hit.slot)
            if change.change is None:
                change.change = np.zeros(self._shape(move), np.float32)
            change.change[move.low : move.high] += scatter(move, delta)

    def _add_factors(self, hit: Hit, up: np.ndarray, down: np.ndarray) -> None:
        assert hit.weight is not None
        up, rows, columns = up * np.float32(hit.patch.factor), None, None
        if hit.patch.magnitude is not None:
            weight = gather(hit.weight, self._leaves)
            gain, axis = hit.gain(weight, (up @ down).reshape(weight.shape))
            if axis == 0:
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


def _scales(
    component: str,
    path: str,
    depth: int | None,
    layers: int | None,
    slots: int,
    strengths: Sequence[Strength],
) -> np.ndarray:
    """The scale of each slot, in each layer of a stack; that of an empty slot is zero."""
    leaf = f"{path}.weight"
    rows = []
    for layer in [None] if layers is None else range(layers):
        name = f"{component}.{path_of(leaf, depth, layer)}".rpartition(".")[0]
        row = [strength.at(name) for strength in strengths]
        rows.append(row + [0.0] * (slots - len(row)))
    return np.array(rows[0] if layers is None else rows, np.float32)


def _place(array: np.ndarray, inner: Any, name: str = "") -> jax.Array:
    """On the devices of a layer; a change of its weight is spread over them as the weight is."""
    weight = inner.weight
    if not isinstance(weight, jax.Array) or not weight.committed:
        return jnp.asarray(array)
    if not isinstance(weight.sharding, NamedSharding):
        return jax.device_put(array, weight.sharding)
    spec = PartitionSpec()
    if name == "change":
        own = (*weight.sharding.spec, *[None] * weight.ndim)[: weight.ndim]
        lead = array.ndim - weight.ndim
        at = 1 if array.shape[0] == weight.shape[0] and lead and array.ndim > 3 else 0
        spec = PartitionSpec(*own[:at], *[None] * lead, *own[at:])
    return jax.device_put(array, NamedSharding(weight.sharding.mesh, spec))
