"""The modules of a component, under every name that a published layout gives them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint import Table, leaf_paths
from ..checkpoint.plan import Move, Shape, compile_plan
from .components import path_of


PARAMETERS = {"weight": "weight", "scale": "weight", "bias": "bias"}
"""The last segment of a tensor's name -> the parameter of its module."""


@dataclasses.dataclass(frozen=True)
class LayoutTensor:
    """A tensor of a layout, with the moves that make leaves of it, in the order of its rows."""

    name: str
    shape: Shape
    moves: tuple[Move, ...]

    def part(self, first: int, last: int) -> "LayoutTensor | None":
        """Returns the rows of some of the moves as a tensor of their own."""
        if not 0 <= first <= last < len(self.moves):
            return None
        moves = self.moves[first : last + 1]
        start = moves[0].start
        moves = tuple(
            dataclasses.replace(m, start=m.start - start, stop=m.stop - start) for m in moves
        )
        return LayoutTensor(self.name, (moves[-1].stop, *self.shape[1:]), moves)


@dataclasses.dataclass(frozen=True)
class LayoutModule:
    """A module of a layout, with its weight and its bias as far as it has them."""

    layout: str
    name: str
    weight: LayoutTensor | None = None
    bias: LayoutTensor | None = None


class LayerIndex:
    """The modules of one component by name, in several layouts at once."""

    def __init__(self, skeleton: Any, tables: Sequence[Table]):
        """**Arguments:**

        - `skeleton`: the module, or its shapes.
        - `tables`: the key tables of its layouts. A name that two layouts share means the module of
            the first.
        """
        leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(skeleton).items()}
        own = Table("own", stack=tables[0].stack if tables else ())
        self._dotted: dict[str, LayoutModule] = {}
        self._flat: dict[str, LayoutModule | None] = {}
        for table in (*tables, own):
            self._add(_modules(dataclasses.replace(table, prefix=("",)), tuple(leaves.items())))

    def _add(self, modules: Mapping[str, LayoutModule]) -> None:
        flat: dict[str, LayoutModule | None] = {}
        for name, module in modules.items():
            key = name.replace(".", "_")
            flat[key] = module if flat.get(key, module) == module else None
        for key, module in flat.items():
            self._flat.setdefault(key, module)
        for name, module in modules.items():
            self._dotted.setdefault(name, module)

    def find(self, name: str, *, flat: bool) -> LayoutModule | None:
        """Returns a module by name, or parts of a fused one: `linear1.0-2` is the first three."""
        known: Mapping[str, LayoutModule | None] = self._flat if flat else self._dotted
        if name in known:
            return known[name]
        whole, _, part = name.rpartition("_" if flat else ".")
        first, _, last = part.partition("-")
        module = known.get(whole)
        if module is None or not _is_number(first) or (last and not _is_number(last)):
            return None
        cut = lambda tensor: tensor and tensor.part(int(first), int(last or first))
        part_of = LayoutModule(module.layout, name, cut(module.weight), cut(module.bias))
        fused = module.weight is not None and len(module.weight.moves) > 1
        return part_of if fused and part_of.weight is not None else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 4


@functools.lru_cache(maxsize=16)  # adapters come one after another to models of the same shapes
def _modules(table: Table, leaves: tuple[tuple[str, Shape], ...]) -> Mapping[str, LayoutModule]:
    """The modules of one layout, each under every spelling that the table knows.

    The result is empty where the layout is one of other models of this kind.
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
    whole: dict[str, LayoutModule] = {}
    for name, items in moves.items():
        ordered = tuple(sorted(items, key=lambda move: move.start))
        tensor = LayoutTensor(name, plan.shapes[name], ordered)
        for spelling in spellings[name]:
            module, _, last = spelling.rpartition(".")
            if last in PARAMETERS:
                parts.setdefault(module, {"name": name.rpartition(".")[0]})[PARAMETERS[last]] = (
                    tensor
                )
            if last != "bias":
                whole[spelling] = LayoutModule(table.name, name, tensor)
    modules = {module: LayoutModule(table.name, **fields) for module, fields in parts.items()}
    return whole | modules
