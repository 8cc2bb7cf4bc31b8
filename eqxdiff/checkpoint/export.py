"""From a module to the tensors of a published layout: the plan of loading, run backwards."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..distributed import to_host
from ..passes import published
from ..tensors.source import TensorInfo
from .load import leaf_paths
from .plan import Move, Shape, compile_plan
from .table import Table


def export_infos(module: Any, table: Table) -> dict[str, TensorInfo]:
    """Returns the name, shape and dtype of every tensor that `export_tensors` yields, in its order.

    `module` may be a skeleton. **Raises:** `ValueError` where the table does not cover the module.
    """
    return {tensor: info for tensor, info, _ in _layout(module, table)}


def export_tensors(module: Any, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the table's layout, each in the dtype of its leaf.

    The weights are in the checkpoint's order, whatever passes the module has gone through.

    Of a tensor with several spellings the first is written; what the table drops is not. Where the
    module is spread over processes, all of them must run this to its end.

    **Raises:** `ValueError` where the table does not cover the module.
    """
    leaves = leaf_paths(published(module))
    for tensor, info, moves in _layout(module, table):
        out = np.empty(info.shape, info.dtype)
        for move in moves:
            piece = move.to_theirs(_rows(leaves[move.leaf], move))
            if out.ndim:
                out[move.start : move.stop] = piece
            else:
                out[...] = piece
        yield tensor, out


def _layout(module: Any, table: Table) -> list[tuple[str, TensorInfo, list[Move]]]:
    leaves = leaf_paths(module)
    shapes: dict[str, Shape] = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    plan = compile_plan(table, shapes)
    moves: dict[str, list[Move]] = {}
    for items in plan.moves.values():
        for move in items:
            moves.setdefault(move.tensor, []).append(move)
    layout = []
    for tensor in moves:
        dtypes = {np.dtype(leaves[move.leaf].dtype) for move in moves[tensor]}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"{tensor} cannot be made of leaves of several dtypes: {names}")
        layout.append((tensor, TensorInfo(plan.shapes[tensor], dtypes.pop()), moves[tensor]))
    # Wide numbers first: each tensor is then aligned to the size of its numbers in the file.
    return sorted(layout, key=lambda item: (-item[1].dtype.itemsize, natural_order(item[0])))


def natural_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sorts `blocks.2` before `blocks.10`."""
    return tuple((not s.isdigit(), int(s) if s.isdigit() else 0, s) for s in name.split("."))


def _rows(leaf: Any, move: Move) -> np.ndarray:
    """Returns the rows of a leaf that a move concerns, on the host."""
    if isinstance(leaf, jax.Array) and not _is_host(leaf):
        # one layer at a time: the host copy of a whole leaf would be kept with the array
        piece = leaf if move.layer is None else leaf[move.layer]
        host = to_host(piece[move.low : move.high] if piece.ndim else piece)
    else:
        piece = np.asarray(leaf)
        piece = piece if move.layer is None else piece[move.layer]
        host = piece[move.low : move.high] if piece.ndim else piece
    return host


def _is_host(array: jax.Array) -> bool:
    devices = array.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"
