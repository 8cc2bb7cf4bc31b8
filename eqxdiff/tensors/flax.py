"""Weights of Flax, as the pipelines that diffusers had until 0.36 saved them in msgpack files.

Only where each array lies in the file is read at first, and then the arrays one by one.

Formats: https://github.com/msgpack/msgpack/blob/master/spec.md and
https://github.com/google/flax/blob/v0.8.5/flax/serialization.py
"""

import math
import os
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .._errors import CheckpointError
from .raw import Entry, RawFile, RawSource
from .source import AbstractTensorSource, TensorInfo, show


DTYPES = {
    **{str(np.dtype(kind)): np.dtype(kind) for kind in ("f2", "f4", "f8", "i1", "i4", "i8", "u1")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
ARRAY = 1
"""The extension type of an array: its shape, the name of its dtype, and its bytes."""

MOST_DEPTH = 40
MOST_TEXT = 1000

NUMBERED = re.compile(
    r"^(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|to_out"
    r"|net|controlnet_down_blocks|blocks)_(\d+)$"
)
"""Lists, whose number Flax joins to their name."""

LAST = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Place(NamedTuple):
    """Where an array is."""

    offset: int
    info: TensorInfo


class _Damaged(Exception):
    pass


def open_flax(path: str | os.PathLike[str], name: str | None = None) -> AbstractTensorSource:
    """Opens a `flax_model.msgpack`. Its tensors are named and laid out as in PyTorch.

    **Raises:** `CheckpointError` where it is damaged.
    """
    name = str(path) if name is None else name
    file = RawFile(path, name)
    try:
        tree = _Scanner(file).scan()
        entries: dict[str, Entry] = {}
        for flax, place in _flatten(tree, ()):
            key, entry = _translate(flax, place)
            if key in entries:
                raise _Damaged(f"{show(key)} is there twice")
            entries[key] = entry
    except _Damaged as error:
        raise CheckpointError(f"{name} is no valid Flax checkpoint: {error}.") from None
    if not entries:
        raise CheckpointError(f"{name} is no valid Flax checkpoint: it holds no arrays.")
    return RawSource(file, entries)


def _flatten(tree: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Place]]:
    if isinstance(tree, Place):
        return [(path, tree)]
    if not isinstance(tree, dict):
        return []
    if "__msgpack_chunked_array__" in tree:
        raise _Damaged("it has an array of more than a gigabyte, in chunks: that is not supported")
    return [item for key, value in tree.items() for item in _flatten(value, (*path, key))]


def _translate(path: tuple[str, ...], place: Place) -> tuple[str, Entry]:
    """PyTorch's name of an array, and how its axes are ordered there."""
    segments = [NUMBERED.sub(r"\1.\2", segment) for segment in path]
    if segments[0] == "params":
        segments = segments[1:]
    last = segments[-1] if segments else ""
    if last not in LAST:
        raise _Damaged(f"{show('/'.join(path))} is of an unknown kind")
    rank = len(place.info.shape)
    axes = tuple(range(rank))
    if last == "kernel":
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(rank, axes)
    return ".".join([*segments[:-1], LAST[last]]), Entry(place.offset, place.info, axes)


class _Scanner:
    """Walks through a msgpack file and skips the bytes of its arrays."""

    def __init__(self, file: RawFile):
        self._file, self._at = file, 0
        self._window, self._start = b"", 0

    def scan(self) -> Any:
        tree = self._value(0)
        if self._at != self._file.size:
            raise _Damaged(f"{self._file.size - self._at} bytes follow its end")
        return tree

    def _take(self, length: int) -> bytes:
        if length > self._file.size - self._at:
            raise _Damaged("it is truncated")
        begin = self._at - self._start
        if not 0 <= begin <= len(self._window) - length:
            size = min(max(length, 4096), self._file.size - self._at)
            self._window, self._start, begin = self._file.bytes(self._at, size), self._at, 0
        self._at += length
        return self._window[begin : begin + length]

    def _number(self, length: int) -> int:
        return int.from_bytes(self._take(length), "big")

    def _skip(self, length: int) -> None:
        if length > self._file.size - self._at:
            raise _Damaged("it is truncated")
        self._at += length

    def _text(self, length: int) -> str:
        if length > MOST_TEXT:
            raise _Damaged("it has a name that is too long")
        try:
            text = self._take(length).decode()
        except UnicodeDecodeError:
            raise _Damaged("it has a name that is no text") from None
        if not text.isprintable():
            raise _Damaged(f"the name {show(text)} cannot be printed")
        return text

    def _value(self, depth: int) -> Any:
        if depth > MOST_DEPTH:
            raise _Damaged("it is nested too deeply")
        code = self._number(1)
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 256
        if code < 0x90:
            return self._map(code & 0x0F, depth)
        if code < 0xA0:
            return self._list(code & 0x0F, depth)
        if code < 0xC0:
            return self._text(code & 0x1F)
        match code:
            case 0xC0 | 0xC2 | 0xC3:
                return {0xC0: None, 0xC2: False, 0xC3: True}[code]
            case 0xC4 | 0xC5 | 0xC6:
                return self._skip(self._number(1 << (code - 0xC4)))
            case 0xC7 | 0xC8 | 0xC9:
                length = self._number(1 << (code - 0xC7))
                return self._extension(length)
            case 0xCA | 0xCB:
                return self._skip(4 << (code - 0xCA))
            case 0xCC | 0xCD | 0xCE | 0xCF:
                return self._number(1 << (code - 0xCC))
            case 0xD0 | 0xD1 | 0xD2 | 0xD3:
                return self._skip(1 << (code - 0xD0))
            case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
                return self._extension(1 << (code - 0xD4))
            case 0xD9 | 0xDA | 0xDB:
                return self._text(self._number(1 << (code - 0xD9)))
            case 0xDC | 0xDD:
                return self._list(self._number(2 << (code - 0xDC)), depth)
            case 0xDE | 0xDF:
                return self._map(self._number(2 << (code - 0xDE)), depth)
        raise _Damaged(f"it has the unknown code {code}")

    def _list(self, length: int, depth: int) -> list[Any]:
        return [self._value(depth + 1) for _ in range(self._bounded(length))]

    def _map(self, length: int, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for _ in range(self._bounded(length)):
            key = self._value(depth + 1)
            if not isinstance(key, str) or key in items:
                raise _Damaged("it has a key that is no text or is there twice")
            items[key] = self._value(depth + 1)
        return items

    def _bounded(self, length: int) -> int:
        if length > self._file.size - self._at:
            raise _Damaged("it is truncated")
        return length

    def _extension(self, length: int) -> Place | None:
        kind, end = self._number(1), self._at + length
        if kind != ARRAY:
            return self._skip(length)
        if self._number(1) != 0x93:
            raise _Damaged("it has an array that is not described by shape, dtype and bytes")
        shape, dtype = self._value(0), self._value(0)
        natural = isinstance(shape, list) and all(
            type(n) is int and 0 <= n < 1 << 48 for n in shape
        )
        if not natural or len(shape) > 8 or not isinstance(dtype, str) or dtype not in DTYPES:
            raise _Damaged(f"it has an array of the unknown shape or dtype {show(str(dtype))}")
        code = self._number(1)
        if code not in (0xC4, 0xC5, 0xC6):
            raise _Damaged("it has an array that is not described by shape, dtype and bytes")
        size = self._number(1 << (code - 0xC4))
        place = Place(self._at, TensorInfo(tuple(shape), DTYPES[dtype]))
        if math.prod(shape) * DTYPES[dtype].itemsize != size or self._at + size != end:
            raise _Damaged("it has an array whose shape and bytes do not agree")
        self._skip(size)
        return place
