"""A component on its way from one layout to another, in pieces of a few megabytes."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ..checkpoint import Table, leaf_paths
from ..checkpoint.cast import widest
from ..checkpoint.export import natural_order
from ..checkpoint.plan import Move, Plan, compile_plan
from ..checkpoint.read import Reader, check_copies
from ..tensors import AbstractTensorSource, TensorInfo
from .open import Opened


CHUNK_BYTES = 16 << 20
"""A tensor is converted in pieces of this size, except for the few whose axes change places."""


@dataclasses.dataclass(frozen=True)
class Recast:
    """A component on its way to another layout.

    **Fields:**

    - `infos`: the tensors of the other layout, in order.
    - `moves`: tensor of the other layout -> the moves that make it, in the order of its rows.
    """

    name: str
    opened: Opened
    plan: Plan
    infos: Mapping[str, TensorInfo]
    moves: Mapping[str, tuple[Move, ...]]

    @classmethod
    def make(cls, name: str, opened: Opened, table: Table, dtype: DTypeLike | None) -> "Recast":
        """Plans it. **Raises:** `CheckpointError` where the component does not fit the model."""
        source = opened.tensors
        leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(opened.skeleton).items()}
        file = {tensor: info.shape for tensor, info in source.tensors.items()}
        plan = compile_plan(opened.table, leaves, file, name=name)
        check_copies(source, plan, name)
        target = compile_plan(table, leaves)
        moves: dict[str, list[Move]] = {}
        for items in target.moves.values():
            for move in items:
                moves.setdefault(move.tensor, []).append(move)
        infos = {
            tensor: TensorInfo(target.shapes[tensor], _dtype(source, plan, items, dtype))
            for tensor, items in moves.items()
        }
        # wide numbers first: each tensor is then aligned to the size of its numbers in the file
        order = sorted(infos, key=lambda t: (-infos[t].dtype.itemsize, natural_order(t)))
        ordered = {t: tuple(sorted(moves[t], key=lambda move: move.start)) for t in order}
        return cls(name, opened, plan, {tensor: infos[tensor] for tensor in order}, ordered)

    def chunks(self, tensor: str, reader: Reader) -> Iterator[np.ndarray]:
        """Yields the numbers of one of `infos` in order, a piece at a time."""
        info = self.infos[tensor]
        for move in self.moves[tensor]:
            rows = move.high - move.low
            plain = move.axes is None and move.scale is None and move.theirs[:1] == move.ours[:1]
            row = max(math.prod(move.ours[1:]) * info.dtype.itemsize, 1)
            step = max(CHUNK_BYTES // row, 1) if plain and move.ours else rows
            for low in range(move.low, move.high, step):
                high = min(low + step, move.high)
                box = ((low, high), *((0, size) for size in move.ours[1:])) if move.ours else ()
                layer = () if move.layer is None else ((move.layer, move.layer + 1),)
                piece = reader.fill(self.plan, move.leaf, (*layer, *box), info.dtype)
                piece = piece if move.layer is None else piece[0]
                yield piece if step < rows else move.to_theirs(piece)


def _dtype(
    source: AbstractTensorSource, plan: Plan, moves: list[Move], wanted: DTypeLike | None
) -> np.dtype:
    """Returns the dtype that a tensor is written in: by default the widest that it is made of."""
    found = [
        source.dtype_of(own.tensor)
        for move in moves
        for own in plan.moves.get(move.leaf, ())
        if own.layer == move.layer
    ]
    own = widest(found or [source.dtype])
    floating = jnp.issubdtype(own, jnp.floating)
    return np.dtype(own if wanted is None or not floating else wanted)
