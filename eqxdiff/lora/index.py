"""Which modules a model has, under every name that a published layout gives them."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from ..checkpoint import Table, leaf_paths, read_table
from ..checkpoint.load import dotted
from ..checkpoint.plan import Move, Shape, compile_plan
from ..checkpoint.table import TableFile
from ..models import FAMILIES


PARAMETERS = {"weight": "weight", "scale": "weight", "bias": "bias"}
"""The last segment of a tensor's name, and what it is to its module."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a layout: the moves that make it leaves, in the order of its rows."""

    name: str
    shape: Shape
    moves: tuple[Move, ...]

    def part(self, first: int, last: int) -> "Tensor | None":
        """The rows of some of its moves, as a tensor of their own."""
        if not 0 <= first <= last < len(self.moves):
            return None
        moves = self.moves[first : last + 1]
        start = moves[0].start
        moves = tuple(
            dataclasses.replace(m, start=m.start - start, stop=m.stop - start) for m in moves
        )
        return Tensor(self.name, (moves[-1].stop, *self.shape[1:]), moves)


@dataclasses.dataclass(frozen=True)
class Site:
    """A module of a layout, with what it has of weight and bias."""

    layout: str
    name: str
    weight: Tensor | None = None
    bias: Tensor | None = None


class Index:
    """The modules of one component by name, in several layouts at once."""

    def __init__(self, skeleton: Any, tables: Sequence[Table]):
        """**Arguments:**

        - `skeleton`: the module, or its shapes.
        - `tables`: of its layouts; a name that two of them have is the first's.
        """
        leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(skeleton).items()}
        own = Table("own", stack=tables[0].stack if tables else ())
        self._dotted: dict[str, Site] = {}
        self._flat: dict[str, Site | None] = {}
        for table in (*tables, own):
            self._add(_sites(dataclasses.replace(table, prefix=("",)), tuple(leaves.items())))

    def _add(self, sites: Mapping[str, Site]) -> None:
        flat: dict[str, Site | None] = {}
        for name, site in sites.items():
            key = name.replace(".", "_")
            flat[key] = site if flat.get(key, site) == site else None
        for key, site in flat.items():
            self._flat.setdefault(key, site)
        for name, site in sites.items():
            self._dotted.setdefault(name, site)

    def find(self, name: str, *, flat: bool) -> Site | None:
        """A module by name, or some parts of a fused one: `linear1.0-2`."""
        known: Mapping[str, Site | None] = self._flat if flat else self._dotted
        if name in known:
            return known[name]
        whole, _, part = name.rpartition("_" if flat else ".")
        first, _, last = part.partition("-")
        site = known.get(whole)
        if site is None or not _is_number(first) or (last and not _is_number(last)):
            return None
        cut = lambda tensor: tensor and tensor.part(int(first), int(last or first))
        part_of = Site(site.layout, name, cut(site.weight), cut(site.bias))
        fused = site.weight is not None and len(site.weight.moves) > 1
        return part_of if fused and part_of.weight is not None else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 4


@functools.lru_cache(maxsize=16)  # adapters come one after another to models of the same shapes
def _sites(table: Table, leaves: tuple[tuple[str, Shape], ...]) -> Mapping[str, Site]:
    """The modules of one layout, each under every spelling that the table knows.

    There are none where the layout is of other models of this kind.
    """
    try:
        plan = compile_plan(table, dict(leaves))
    except ValueError:
        return {}
    moves: dict[str, list[Move]] = {}
    spellings: dict[str, set[str]] = {}
    for leaf, items in plan.moves.items():
        at = table.stack_depth_at(leaf)
        for move in items:
            moves.setdefault(move.tensor, []).append(move)
            for use in table.uses(path_of(leaf, at, move.layer)):
                if use.spellings[0] == move.tensor:
                    spellings.setdefault(move.tensor, set()).update(use.spellings)
    parts: dict[str, dict[str, Any]] = {}
    whole: dict[str, Site] = {}
    for name, items in moves.items():
        ordered = tuple(sorted(items, key=lambda move: move.start))
        tensor = Tensor(name, plan.shapes[name], ordered)
        for spelling in spellings[name]:
            module, _, last = spelling.rpartition(".")
            if last in PARAMETERS:
                parts.setdefault(module, {"name": name.rpartition(".")[0]})[PARAMETERS[last]] = (
                    tensor
                )
            if last != "bias":
                whole[spelling] = Site(table.name, name, tensor)
    sites = {module: Site(table.name, **fields) for module, fields in parts.items()}
    return whole | sites


def path_of(leaf: str, depth: int | None, layer: int | None) -> str:
    """A leaf's path with the index of the layer in its place."""
    if depth is None or layer is None:
        return leaf
    segments = leaf.split(".")
    return ".".join([*segments[:depth], str(layer), *segments[depth:]])


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A component found in a model: its name, where it is, and its layouts."""

    name: str
    path: tuple[Any, ...]
    module: Any
    tables: tuple[Table, ...]

    def depth(self, leaf: str) -> int | None:
        """After how many segments of a leaf's path the layer's index comes; `None`: no stack."""
        return self.tables[0].stack_depth_at(leaf) if self.tables else None


def _known() -> Iterator[tuple[type, str, tuple[TableFile, ...]]]:
    """Each class that a family has as a component, with its usual name and its tables."""
    for family in FAMILIES:
        for name, component in family.components.items():
            if inspect.ismethod(component.init) and isinstance(component.init.__self__, type):
                yield component.init.__self__, name, tuple(form.table for form in component.forms)


def find_targets(model: Any, tables: Sequence[Table] | None = None) -> list[Target]:
    """The components in a PyTree: a pipeline, a dictionary of modules, or one module.

    One with no component of any family is a component as a whole, under the name `model`.

    **Arguments:**

    - `tables`: of the layouts of such a model; with none its modules go by their own paths.
    """
    if tables is not None:
        return [Target("model", (), model, tuple(tables))]
    known = list(_known())
    classes = tuple(cls for cls, _, _ in known)
    is_part = lambda node: isinstance(node, classes)
    parts = []
    for path, node in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_part)[0]:
        if is_part(node):
            fits = [entry for entry in known if isinstance(node, entry[0])]
            name = dotted(path[-1:]) if path else fits[0][1]
            names = next((e[2] for e in fits if e[1] == name), fits[0][2])
            parts.append(Target(name, path, node, tuple(map(read_table, names))))
    return parts or [Target("model", (), model, ())]


def follow(tree: Any, path: Sequence[Any]) -> Any:
    """What lies at a path of JAX's keys, or of a dotted path's segments."""
    for key in path:
        match key:
            case jax.tree_util.GetAttrKey(name=name):
                tree = getattr(tree, name)
            case jax.tree_util.SequenceKey(idx=index):
                tree = tree[index]
            case jax.tree_util.DictKey(key=name):
                tree = tree[name]
            case str() if isinstance(tree, tuple | list):
                tree = tree[int(key)]
            case str() if isinstance(tree, dict):
                tree = tree[key]
            case str():
                tree = getattr(tree, key)
            case _:
                raise TypeError(f"{key!r} is no step of a path")
    return tree
