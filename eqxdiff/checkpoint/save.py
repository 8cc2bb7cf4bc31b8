"""Writing safetensors files: one tensor in memory at a time, and all or nothing on disk."""

import collections
import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import CheckpointError
from ..distributed import is_first
from ..tensors.safetensors import DTYPES
from ..tensors.source import TensorInfo
from .export import export_infos, export_tensors
from .table import Table


NAMES = {dtype: name for name, dtype in DTYPES.items()}

MOST_SHARD_BYTES = 10_000_000_000
"""The size of the files that diffusers cuts its checkpoints into."""


def save_module(
    module: Any,
    table: Table,
    folder: str | os.PathLike[str],
    *,
    stem: str = "diffusion_pytorch_model",
    max_shard_bytes: int = MOST_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes a module in the layout of a table, as diffusers or transformers name the files.

    One file `{stem}.safetensors`, or several and their index where it would be larger than
    `max_shard_bytes`. They replace what was saved there under the same stem. Whatever goes wrong
    on the way, the folder is left as it was. Of several processes all call this, and the first one
    writes.

    **Arguments:**

    - `folder`: is made if need be.
    - `stem`: `"model"` for what transformers reads.
    - `metadata`: texts for the files' headers, besides the customary `format: pt`.

    **Returns:** the files written, the index last.

    **Raises:** `CheckpointError` where they cannot be written; `ValueError` where the table does
    not cover the module.
    """
    folder = Path(folder)
    metadata = {"format": "pt", **(metadata or {})}
    infos = export_infos(module, table)
    shards = cut(infos, stem, max_shard_bytes)
    tensors = export_tensors(module, table)
    names = list(shards)
    if not is_first():
        collections.deque(tensors, maxlen=0)
        return [folder / name for name in names]
    with atomic(folder) as new:
        for name, shard in shards.items():
            write_tensors(new(name), shard, tensors, metadata)
        if len(shards) > 1:
            names.append(f"{stem}.safetensors.index.json")
            new(names[-1]).write_text(index_text(shards), encoding="utf-8")
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for file in folder.iterdir():
        if ours.fullmatch(file.name) and file.name not in names:
            file.unlink()
    return [folder / name for name in names]


def write_tensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file of the next `len(infos)` items of `tensors`, which are `infos`."""
    with open(path, "wb") as file:
        file.write(header(infos, metadata))
        for wanted, info in infos.items():
            name, array = next(tensors)
            if (name, array.shape, array.dtype) != (wanted, info.shape, info.dtype):
                raise ValueError(f"{name} of {array.shape} comes where {wanted} is expected")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Makes the head of a safetensors file, whose tensors follow in the order of `infos`."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in infos.items():
        fields[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def atomic(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Makes files appear in `folder` when the block ends well, and else not at all.

    Yields a function from a file's name to the path to write it to meanwhile.

    **Raises:** `CheckpointError` for an `OSError` in the block.
    """
    parts: dict[str, Path] = {}
    made: list[Path] = []
    token = secrets.token_hex(4)

    def new(name: str) -> Path:
        parts[name] = folder / f".{name}.{token}.part"
        return parts[name]

    try:
        made = _make(folder)
        yield new
        for name, part in parts.items():
            os.replace(part, folder / name)
    except BaseException as error:
        for part in parts.values():
            part.unlink(missing_ok=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            where = error.filename or folder
            raise CheckpointError(f"{where} cannot be written: {error.strerror}.") from None
        raise


def _make(folder: Path) -> list[Path]:
    """Makes a folder with its parents, and returns those that were missing, the deepest first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def cut(
    infos: Mapping[str, TensorInfo], stem: str, most: int = MOST_SHARD_BYTES
) -> dict[str, dict[str, TensorInfo]]:
    """Allots the tensors to files, in order: each of at most `most` bytes, or of one tensor."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    count = len(shards)
    if count == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def index_text(shards: Mapping[str, Mapping[str, TensorInfo]]) -> str:
    """Makes the index of several files."""
    index = {
        "metadata": {
            "total_size": sum(i.nbytes for shard in shards.values() for i in shard.values())
        },
        "weight_map": {tensor: name for name, shard in shards.items() for tensor in shard},
    }
    return json.dumps(index, indent=2) + "\n"
