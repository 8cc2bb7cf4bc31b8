"""Arrays at known places of a file, read with positioned reads."""

import itertools
import math
import os
import stat
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from .._errors import CheckpointError
from .source import AbstractTensorSource, Box, TensorInfo


SHORT_RUN_BYTES = 16 << 10
"""Scattered pieces shorter than this are cut from longer reads, instead of one read each. Processes
of several do so only where less than half of what they read is in vain."""

COVER_BYTES = 4 << 20
"""The length of those longer reads."""


class RawFile:
    """An open file. It is closed when the last reference to it goes."""

    def __init__(self, path: str | os.PathLike[str], name: str):
        """Opens the file, which errors call `name`. **Raises:** `CheckpointError`."""
        self.name = name
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointError(f"{name} is not a file.")
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}.") from None
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def bytes(self, offset: int, length: int) -> bytes:
        """Reads bytes. **Raises:** `CheckpointError` where the file ends too early."""
        data = np.empty(length, np.uint8)
        self.fill(offset, data)
        return data.tobytes()

    def fill(self, offset: int, out: np.ndarray) -> None:
        """Fills a contiguous array with the file's bytes from `offset` on."""
        view = out.reshape(-1).view(np.uint8).data
        while len(view):
            try:
                count = os.preadv(self._file, [view], offset)
            except OSError as error:
                raise CheckpointError(f"{self.name} cannot be read: {error.strerror}.") from None
            if count == 0:
                raise CheckpointError(
                    f"{self.name} is damaged: the file has become shorter while it was read."
                )
            view, offset = view[count:], offset + count

    def read(self, offset: int, info: TensorInfo, box: Box, out: np.ndarray) -> None:
        """Copies the box `box` of the array at `offset` into `out`, which is contiguous."""
        if not out.size:
            return
        strides = [info.dtype.itemsize] * len(info.shape)
        for axis in reversed(range(len(info.shape) - 1)):
            strides[axis] = strides[axis + 1] * info.shape[axis + 1]
        # a run of bytes without a gap spans the last axis that is cut, and all those after it
        cut = [axis for axis, n in enumerate(info.shape) if box[axis] != (0, n)]
        axis = cut[-1] if cut else 0
        origin = offset + sum(start * s for (start, _), s in zip(box, strides, strict=True))
        outer = out.shape[:axis]
        run = out.nbytes // math.prod(outer)
        # Many hosts that read all of a file to keep a part each would exhaust the file system. One
        # that has the file in memory reads long pieces several times as fast.
        exact = jax.distributed.is_initialized() and strides[0] * out.shape[0] >= 2 * out.nbytes
        if not outer or run >= SHORT_RUN_BYTES or exact:
            rows = out.reshape(-1).view(np.uint8).reshape(-1, run)
            for row, place in zip(rows, itertools.product(*map(range, outer)), strict=True):
                at = sum(i * s for i, s in zip(place, strides, strict=False))
                self.fill(origin + at, row)
            return
        rows = max(COVER_BYTES // strides[0], 1)
        columns = tuple(slice(*bounds) for bounds in box[1:])
        start, stop = box[0]
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            cover = np.empty((last - first, *info.shape[1:]), info.dtype)
            self.fill(offset + first * strides[0], cover)
            out[first - start : last - start] = cover[:, *columns]


class Entry(NamedTuple):
    """An array in a file: the one that is stored there with its axes in the order `axes`."""

    offset: int
    stored: TensorInfo
    axes: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(tuple(self.stored.shape[i] for i in self.axes), self.stored.dtype)


class RawSource(AbstractTensorSource):
    """The tensors of a file that keeps them as they are in memory."""

    def __init__(self, file: RawFile, entries: Mapping[str, Entry]):
        """Checks the entries. **Raises:** `CheckpointError` where one lies beyond the file."""
        for name, entry in entries.items():
            if entry.offset < 0 or entry.offset + entry.stored.nbytes > file.size:
                raise CheckpointError(f"{file.name} is truncated: {name} lies beyond its end.")
        self._file, self._entries = file, dict(entries)
        self._tensors = {name: entry.info for name, entry in entries.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        offset, stored, axes = self._entries[name]
        order = np.argsort(axes)
        if list(order) == list(range(len(axes))):
            self._file.read(offset, stored, box, out)
            return
        stored_box = tuple(box[i] for i in order)
        piece = np.empty([stop - start for start, stop in stored_box], stored.dtype)
        self._file.read(offset, stored, stored_box, piece)
        out[...] = piece.transpose(axes)
