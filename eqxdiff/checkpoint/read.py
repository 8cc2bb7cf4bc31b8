"""Fills leaves from a source of tensors, piece by piece, with several threads."""

import contextlib
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from .._errors import CheckpointError
from ..tensors.source import AbstractTensorSource, Box
from .cast import cast, is_finite
from .plan import Move, Plan, Shape


CHUNK_BYTES = 4 << 20
"""A tensor is read, checked and cast in pieces of this size, which stay in the cache."""

HUGE_BYTES = 4 << 20
MOST_THREADS = 8


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Makes an uninitialised array that a CPU device can take over as it is.

    Where it is large it lies in huge pages if the system has them: faulting in the usual ones takes
    several times as long as reading the file does.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_BYTES or sys.platform != "linux":
        memory = np.empty(nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        return memory[start : start + nbytes].view(dtype).reshape(shape)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


def put(buffer: np.ndarray, device: Any) -> jax.Array:
    """Gives an array that nobody will write to again to a device; a CPU does not copy it."""
    return jax.device_put(buffer, device, may_alias=True)


class Reader:
    """Fills leaves with several threads: reading, checking and casting one piece each."""

    def __init__(
        self,
        source: AbstractTensorSource,
        name: str,
        advance: Callable[[int], None] = lambda count: None,
    ):
        """`name` is what errors call the source; `advance` is told how many bytes of a leaf are
        filled."""
        self._source, self._tensors, self._name = source, source.tensors, name
        self._advance = advance
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS))
        self._scratch = threading.local()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def fill(self, plan: Plan, leaf: str, index: Box, dtype: np.dtype) -> np.ndarray:
        """Reads the box `index` of a leaf."""
        buffer = aligned_empty(tuple(stop - start for start, stop in index), dtype)
        for layer, value in plan.fills.get(leaf, ()):
            _layer(buffer, layer, index)[0][...] = dtype.type(value)
        tasks = []
        for move in plan.moves.get(leaf, ()):
            target, box = _layer(buffer, move.layer, index)
            if target.size and (part := _overlap(move, target, box)) is not None:
                tasks += self._tasks(move, *part)
        if len(tasks) == 1:
            tasks[0]()
            return buffer
        filled = 0
        for count in self._threads.map(lambda task: task(), tasks):
            filled += count
            self._advance(filled)
        return buffer

    def _tasks(self, move: Move, out: np.ndarray, box: Box) -> list[Callable[[], int]]:
        """Returns tasks that fill `out` with a box of a move's rows, in coordinates of its `ours`.

        Each task returns how many bytes it has filled.
        """
        if move.axes is not None:
            order = np.argsort(move.axes)
            out, box = out.transpose(order), tuple(box[i] for i in order)
        if move.theirs == move.between:
            return [partial(self._piece, move, *piece) for piece in self._pieces(move, out, box)]

        def reshaped() -> int:
            whole = np.empty(move.theirs, out.dtype)
            for piece in self._pieces(move, whole, tuple((0, size) for size in move.theirs)):
                self._piece(move, *piece)
            out[...] = whole.reshape(move.between)[tuple(slice(*bounds) for bounds in box)]
            return out.nbytes

        return [reshaped]

    def _pieces(self, move: Move, out: np.ndarray, box: Box) -> list[tuple[np.ndarray, Box]]:
        """Cuts a box of a move's rows into pieces of the tensor that are about a chunk long."""
        if not box:
            return [(out, box)]
        low, high = (move.start + bound for bound in box[0])
        itemsize = self._tensors[move.tensor].dtype.itemsize
        row = max(math.prod(stop - start for start, stop in box[1:]) * itemsize, 1)
        step = max(CHUNK_BYTES // row, 1)
        return [
            (out[a - low : a - low + step], ((a, min(a + step, high)), *box[1:]))
            for a in range(low, high, step)
        ]

    def _piece(self, move: Move, out: np.ndarray, index: Box) -> int:
        dtype = self._tensors[move.tensor].dtype
        in_place = dtype == out.dtype and move.scale is None and out.flags.c_contiguous
        piece = out if in_place else self._scratch_like(out, dtype)
        self._source.read(move.tensor, index, piece)
        if not is_finite(piece):
            raise CheckpointError(f"{self._name}: {move.tensor} holds a value that is not finite.")
        if in_place:
            return out.nbytes
        cast(piece, out, f"{self._name}: {move.tensor}", move.scale)
        return out.nbytes

    def _scratch_like(self, out: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """This thread's own memory; fresh memory for each piece would cost as much as the read."""
        nbytes = out.size * dtype.itemsize
        scratch = vars(self._scratch).get("memory")
        if scratch is None or scratch.size < nbytes:
            scratch = self._scratch.memory = np.empty(nbytes, np.uint8)
        return scratch[:nbytes].view(dtype).reshape(out.shape)


def _layer(buffer: np.ndarray, layer: int | None, index: Box) -> tuple[np.ndarray, Box]:
    """Returns the part of a leaf's box that belongs to a layer, and the part's bounds in it."""
    if layer is None:
        return buffer, index
    start, stop = index[0]
    if not start <= layer < stop:
        return buffer[:0], index[1:]
    return buffer[layer - start], index[1:]


def _overlap(move: Move, target: np.ndarray, box: Box) -> tuple[np.ndarray, Box] | None:
    """Returns the rows of `target`, the box of a layer, that a move fills, and bounds in `ours`."""
    if not box:
        return target, box
    start, stop = max(move.low, box[0][0]), min(move.high, box[0][1])
    if start >= stop:
        return None
    rows = target[start - box[0][0] : stop - box[0][0]]
    return rows, ((start - move.low, stop - move.low), *box[1:])


def check_copies(source: AbstractTensorSource, plan: Plan, name: str) -> None:
    """Checks that a tensor under two names in one file is the same tensor.

    **Raises:** `CheckpointError`.
    """
    for copy, original in plan.copies.items():
        first, second = source.tensors[copy], source.tensors[original]
        row = max(math.prod(first.shape[1:]) * max(first.dtype.itemsize, second.dtype.itemsize), 1)
        step = max(CHUNK_BYTES // row, 1)
        heads = [(a, min(a + step, first.shape[0])) for a in range(0, (*first.shape, 1)[0], step)]
        for head in heads:
            box = (head, *((0, size) for size in first.shape[1:])) if first.shape else ()
            shape = tuple(stop - start for start, stop in box)
            one, two = np.empty(shape, first.dtype), np.empty(shape, second.dtype)
            source.read(copy, box, one)
            source.read(original, box, two)
            if not np.array_equal(one, two):
                raise CheckpointError(f"{name}: {copy} and {original} should be equal and differ.")
