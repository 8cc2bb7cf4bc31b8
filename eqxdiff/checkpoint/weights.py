"""Weights in any kind of file, and configs as the diffusers of today writes them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._errors import SourceError
from .flax import open_flax
from .hub import PICKLES, Source
from .pickles import open_pickle
from .safetensors import SafetensorsFile
from .source import AbstractTensorSource


FLAX = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
TORCH = ("diffusion_pytorch_model.bin", "pytorch_model.bin")


def open_tensors(path: Path, *, pickle: bool = False) -> AbstractTensorSource:
    """Opens a file of weights by what it begins with.

    **Arguments:**

    - `pickle`: whether PyTorch's pickles may be read.

    **Raises:** `CheckpointError` where it is damaged or a pickle.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise SourceError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from None
    if pickle and (head.startswith((b"PK", b"\x80\x02")) or path.name.endswith(PICKLES)):
        return open_pickle(path)
    # A map of msgpack: a safetensors file may begin so too, but then goes on with a brace.
    if head[8:] != b"{" and head and (head[0] in (0xDE, 0xDF) or 0x80 <= head[0] < 0x90):
        return open_flax(path)
    return SafetensorsFile(path)


def source_tensors(source: Source, part: str, *, pickle: bool = False) -> AbstractTensorSource:
    """The weights of a component of a folder, be they of PyTorch or of Flax.

    **Raises:** `SourceError`, `CheckpointError`.
    """
    others = [*FLAX, *(TORCH if pickle else ())]
    found = [f"{part}/{name}" for name in others if source.exists(f"{part}/{name}")]
    try:
        return source.tensors(part)
    except SourceError:
        if not found:
            raise
    return open_tensors(source.path(found[0]), pickle=pickle)


def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the Flax classes as one of those that took their place."""
    return {key: _plain(value) for key, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.removeprefix("Flax") if isinstance(value, str) else value
