"""Tensors of PyTorch's pickles, read without running anything that is in them.

The format: https://docs.pytorch.org/docs/2.9/notes/serialization.html
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from .._errors import CheckpointError
from .raw import Entry, RawFile, RawSource
from .source import AbstractTensorSource, TensorInfo, show


PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""The endings of the names of PyTorch's files."""

STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ShortStorage": np.dtype(np.int16),
}

IGNORED = ("numpy", "pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "_codecs")
"""Packages whose objects training leaves in its files besides tensors: they are passed over."""

MOST_PICKLE_BYTES = 100_000_000
MOST_SHARING = 2
"""Tensors may share memory, as tied weights do, but not make more than this of the file's size."""


class Storage(NamedTuple):
    dtype: np.dtype
    key: str
    numel: int


class View(NamedTuple):
    """A tensor as the pickle describes it: a part of a storage."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Nothing:
    """Stands for what is passed over: takes anything and keeps nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _Refused(Exception):
    pass


def _tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> View:
    natural = lambda value: type(value) is int and 0 <= value < 1 << 48
    sizes = (*shape, *strides, start) if isinstance(shape, tuple | list) else (None,)
    if not isinstance(storage, Storage) or not all(map(natural, sizes)):
        raise _Refused("a tensor is described in an unknown way")
    return View(storage, start, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _dictionary(*_: Any) -> dict[Any, Any]:
    return {}


GLOBALS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}
"""All that a pickle may name."""


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Makes numbers, texts, lists, dictionaries and descriptions of tensors, and nothing else.

    It is the one in Python, whose memory is a dictionary: that in C can be told to allocate.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()  # pyright: ignore
        if code != pickle.BYTEARRAY8[0]  # which makes as many bytes as it is told to
    }

    def find_class(self, module: str, name: str) -> Any:
        known = GLOBALS.get((module, name))
        if known is not None:
            return known
        if module.partition(".")[0] in IGNORED:
            return Nothing
        raise _Refused(f"it asks for {show(f'{module}.{name}')}, which is no tensor")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, int(numel)):
                return Storage(dtype, key, numel)
        raise _Refused("a tensor is described in an unknown way")

    def get_extension(self, code: int) -> None:
        raise _Refused("it asks for an extension")


def open_pickle(path: str | os.PathLike[str], name: str | None = None) -> AbstractTensorSource:
    """Opens the tensors of a `.ckpt`, `.bin`, `.pt` or `.pth` file of PyTorch 1.6 or later.

    Of a dictionary with a `state_dict` these are the tensors of that one.

    **Raises:** `CheckpointError` where it is damaged or holds what is not plain tensors.
    """
    name = str(path) if name is None else name
    file = RawFile(path, name)
    try:
        with open(path, "rb") as opened, zipfile.ZipFile(opened) as archive:
            return RawSource(file, _entries(archive, file))
    except _Refused as error:
        why = str(error)
    except zipfile.BadZipFile:
        why = "it is no zip archive, as PyTorch writes since version 1.6: save it again"
    except CheckpointError:
        raise
    except (OSError, RecursionError, MemoryError):
        why = "it cannot be read"
    except Exception:  # whatever a pickle or an archive can be wrong in
        why = "its pickle is not valid"
    raise CheckpointError(f"{name} is refused: {why}.")


def _entries(archive: zipfile.ZipFile, file: RawFile) -> dict[str, Entry]:
    members = {member.filename: member for member in archive.infolist()}
    root = next((name for name in members if name.endswith("data.pkl")), None)
    if root is None:
        raise _Refused("it has no data.pkl")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise _Refused("it is compressed, which PyTorch never does")
    if members[root].file_size > min(MOST_PICKLE_BYTES, file.size):
        raise _Refused("its pickle is too large")
    tree = _Unpickler(io.BytesIO(archive.read(root)), encoding="utf-8").load()
    folder = root.removesuffix("data.pkl")
    tensors = _tensors(tree)
    if sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values()) > (
        MOST_SHARING * file.size
    ):
        raise _Refused("its tensors would be larger than the file")
    entries = {}
    for name, tensor in tensors.items():
        member = members.get(f"{folder}data/{tensor.storage.key}")
        if member is None:
            raise _Refused(f"the numbers of {show(name)} are missing")
        entries[name] = _entry(name, tensor, member, file)
    return entries


def _tensors(tree: Any) -> dict[str, View]:
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    tensors = tree.items() if isinstance(tree, dict) else ()
    found = {k: v for k, v in tensors if isinstance(k, str) and isinstance(v, View)}
    if not found:
        raise _Refused("it holds no dictionary of tensors")
    for name in found:
        if not name.isprintable() or len(name) > 1000:
            raise _Refused(f"the name {show(name)} cannot be printed or is too long")
    return found


def _entry(name: str, tensor: View, member: zipfile.ZipInfo, file: RawFile) -> Entry:
    """Returns the place of a tensor. Its axes may be stored in another order, but without gaps."""
    shape, strides, dtype = tensor.shape, tensor.strides, tensor.storage.dtype
    order = sorted(range(len(shape)), key=lambda i: (-strides[i], shape[i] == 1, i))
    expected = 1
    for i in reversed(order):
        if shape[i] != 1 and strides[i] != expected:
            raise _Refused(f"{show(name)} is a view with gaps, save it with .contiguous()")
        expected *= shape[i]
    stored = TensorInfo(tuple(shape[i] for i in order), dtype)
    start = tensor.start * dtype.itemsize
    if start + stored.nbytes > member.file_size:
        raise _Refused(f"{show(name)} lies beyond the end of its numbers")
    header = file.bytes(member.header_offset, 30)
    if header[:4] != b"PK\x03\x04":
        raise _Refused("its archive is damaged")
    skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    axes = tuple(int(i) for i in np.argsort(order))
    return Entry(member.header_offset + 30 + skip + start, stored, axes)
