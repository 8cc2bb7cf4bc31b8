"""Reading safetensors files with positioned reads, trusting nothing in the header.

A memory map would count towards resident memory next to the arrays it is copied to, which doubles
the peak; reading straight into the final array does not, and runs in several threads.

Format: https://github.com/huggingface/safetensors/blob/v0.6.2/README.md#format
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from .._errors import CheckpointError
from .raw import RawFile
from .source import AbstractTensorSource, Box, TensorInfo, show


DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""The format's dtypes, by its own names."""

MOST_HEADER_BYTES = 100_000_000
MOST_AXES = 32
MOST_NAME = 1000


class SafetensorsFile(AbstractTensorSource):
    """An open safetensors file. It is closed when the last reference to it goes.

    - `metadata`: the header's `__metadata__`.
    - `fingerprint`: a SHA-256 in hex of the header and the file's size: cheap, and different for
      files of other tensors, but blind to a change of numbers alone.
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None):
        """**Arguments:**

        - `name`: what errors call the file; its path by default.

        **Raises:** `CheckpointError` where it cannot be read or its header is damaged.
        """
        self._name = str(path) if name is None else name
        self._file = RawFile(path, self._name)
        size = self._file.size
        header = self._read_header(size)
        self._data = 8 + len(header)
        self._tensors, self._offsets, self.metadata = parse_header(
            header, size - self._data, self._name
        )
        self.fingerprint = hashlib.sha256(header + size.to_bytes(8, "little")).hexdigest()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def _read_header(self, size: int) -> bytes:
        if size < 8:
            self._fail(f"the file has {size} bytes, too few for any header")
        head = self._file.bytes(0, 8)
        length = int.from_bytes(head, "little")
        if length > MOST_HEADER_BYTES or length > size - 8:
            self._fail(_not_safetensors(head) or _too_long(length, size))
        return self._file.bytes(8, length)

    def _fail(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self._name} is not a valid safetensors file: {why}.")

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        self._file.read(self._data + self._offsets[name], self._tensors[name], box, out)


class MergedSource(AbstractTensorSource):
    """The tensors of several sources as one, each name being in one of them."""

    def __init__(self, sources: Iterable[AbstractTensorSource]):
        self._sources = {name: source for source in sources for name in source.tensors}
        self._tensors = {name: source.tensors[name] for name, source in self._sources.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        self._sources[name].read(name, box, out)


def parse_header(
    header: bytes, data_bytes: int, name: str
) -> tuple[dict[str, TensorInfo], dict[str, int], dict[str, str]]:
    """Tensors, their offsets into the data, and metadata.

    **Arguments:**

    - `header`: the JSON.
    - `data_bytes`: how many bytes follow it in the file.
    - `name`: what errors call the file.

    **Raises:** `CheckpointError`.
    """
    try:
        return _parse_header(header, data_bytes)
    except _Invalid as error:
        why = str(error)
    except RecursionError:
        why = "its header is nested too deeply"
    except ValueError:  # of json or of decoding; its own words may quote megabytes of the file
        why = "its header is not JSON"
    raise CheckpointError(f"{name} is not a valid safetensors file: {why}.")


class _Invalid(Exception):
    pass


def _parse_header(
    header: bytes, data_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, int], dict[str, str]]:
    if not header.startswith(b"{"):
        raise _Invalid("its header does not begin with a brace")
    entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise _Invalid("its __metadata__ is not a list of texts")
    spans: list[tuple[int, int, str]] = []
    tensors, offsets = {}, {}
    for name, entry in entries.items():
        tensors[name], start, stop = _parse_entry(name, entry)
        offsets[name] = start
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps the tensor before it" if start < end else "follows a gap"
            raise _Invalid(f"{show(name)} {what} in the data")
        end = stop
    if data_bytes < end:
        raise _Invalid(f"it is truncated, {end - data_bytes} of {end} bytes of data are missing")
    if data_bytes > end:
        raise _Invalid(f"{data_bytes - end} bytes follow the last tensor")
    return tensors, offsets, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise _Invalid(f"its header has {show(twice)} twice")
    return result


def _parse_entry(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not name.isprintable() or len(name) > MOST_NAME:
        raise _Invalid(f"the name {show(name)} cannot be printed or is too long")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Invalid(f"{show(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Invalid(f"{show(name)} has the unknown dtype {show(str(dtype))}")
    if not _naturals(shape) or len(shape) > MOST_AXES:
        raise _Invalid(f"{show(name)} has a shape that is no list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Invalid(f"{show(name)} has offsets that are no start and end")
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    start, stop = offsets
    if math.prod(max(size, 1) for size in shape) * info.dtype.itemsize >= 1 << 63:
        raise _Invalid(f"{show(name)} has a shape larger than any memory")
    if info.nbytes != stop - start:
        raise _Invalid(
            f"{show(name)} takes {info.nbytes} bytes by its shape and {stop - start} by its offsets"
        )
    return info, start, stop


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _not_safetensors(head: bytes) -> str:
    """Says by its first eight bytes what the file is instead."""
    if head.startswith(b"PK\x03\x04") or head.startswith(b"\x80\x02"):
        return "it is a PyTorch pickle"
    if head.startswith(b"version "):
        return "it is a Git LFS pointer, fetch the file itself with `git lfs pull`"
    if head.lstrip().startswith(b"<"):
        return "it is a web page"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file"
    return ""


def _too_long(length: int, size: int) -> str:
    if length > MOST_HEADER_BYTES:
        return f"its header would have {length} bytes, more than {MOST_HEADER_BYTES} are allowed"
    return f"it is truncated, its header has {length} bytes and the file {size}"


def merge_shards(
    weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile], name: str
) -> AbstractTensorSource:
    """Joins the tensors of a sharded checkpoint, which must be as its index says.

    **Arguments:**

    - `weight_map`: tensor name -> shard, of the index.
    - `files`: shard -> open file.
    - `name`: what errors call the index.

    **Raises:** `CheckpointError`.
    """
    actual: dict[str, list[str]] = {}
    for shard, file in files.items():
        for tensor in file.tensors:
            actual.setdefault(tensor, []).append(shard)
    problems = []
    for tensor, shard in weight_map.items():
        if shard not in actual.get(tensor, ()):
            problems.append(f"{show(tensor)} is not in {show(shard)}")
    for tensor, shards in actual.items():
        if len(shards) > 1:
            problems.append(f"{show(tensor)} is in several files: {', '.join(sorted(shards))}")
        elif tensor not in weight_map:
            problems.append(f"{show(tensor)} of {shards[0]} is not listed")
    if problems:
        raise CheckpointError(_listing(f"{name} does not agree with its files:", problems))
    return MergedSource(files.values())


def read_index(text: bytes | str, name: str) -> dict[str, str]:
    """Reads the `weight_map` of an index of shards: tensor name -> file beside the index.

    **Raises:** `CheckpointError`.
    """
    try:
        index = json.loads(text, object_pairs_hook=_unique)
    except (_Invalid, ValueError, RecursionError):
        raise CheckpointError(f"{name} is damaged: it is not valid JSON.") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{name} is damaged: it has no weight_map.")
    for tensor, shard in weight_map.items():
        plain = isinstance(shard, str) and shard == Path(shard).name and shard.isprintable()
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{name} is damaged: {show(tensor)} is in {show(str(shard))}, "
                "which is not a safetensors file beside it."
            )
    return weight_map


def _listing(header: str, problems: Sequence[str], most: int = 10) -> str:
    shown = list(problems[:most])
    if len(problems) > most:
        shown.append(f"and {len(problems) - most} more")
    return "\n  ".join([header, *shown])
