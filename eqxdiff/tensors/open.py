"""Opens a file of tensors by what it begins with."""

import os
from pathlib import Path

from .._errors import SourceError
from .flax import open_flax
from .pickles import PICKLES, open_pickle
from .safetensors import SafetensorsFile
from .source import AbstractTensorSource


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
