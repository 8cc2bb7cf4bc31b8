"""The interface of a file of tensors: names, shapes, dtypes, and reading a box of a tensor."""

import abc
import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np


Box = tuple[tuple[int, int], ...]
"""A box of a tensor: `(start, stop)` for each axis."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The shape and the dtype of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class AbstractTensorSource(abc.ABC):
    """Named tensors that are read part by part; reading is safe from several threads."""

    @property
    @abc.abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the source by name."""

    @property
    def dtype(self) -> np.dtype:
        """The floating point dtype of most bytes; float32 where no tensor is floating point.

        It is bfloat16 in place of a dtype of 8 bits, which is too coarse for norms and biases.
        """
        sizes: dict[np.dtype, int] = {np.dtype(np.float32): 0}
        for name, info in self.tensors.items():
            if jnp.issubdtype(info.dtype, jnp.floating):
                dtype = self.dtype_of(name)
                sizes[dtype] = sizes.get(dtype, 0) + info.nbytes
        dtype = max(sizes, key=lambda dtype: sizes[dtype])
        return dtype if dtype.itemsize > 1 else np.dtype(jnp.bfloat16)

    def dtype_of(self, name: str) -> np.dtype:
        """Returns the dtype that suits a tensor: it may be narrower than the one it is read in."""
        return self.tensors[name].dtype

    @abc.abstractmethod
    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        """Copies the box `box` of tensor `name` into `out`.

        `out` is C-contiguous and has the tensor's dtype and the box's shape.

        **Raises:** `CheckpointError` where the file is damaged.
        """


class InMemory(AbstractTensorSource):
    """Tensors that are already arrays, by name."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self._tensors = {
            n: TensorInfo(array.shape, array.dtype) for n, array in self._arrays.items()
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        out[...] = self._arrays[name][tuple(slice(*bounds) for bounds in box)]


class Subset(AbstractTensorSource):
    """Some of the tensors of a source."""

    def __init__(self, source: AbstractTensorSource, names: Iterable[str]):
        self._source = source
        self._tensors = {name: source.tensors[name] for name in names}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def dtype_of(self, name: str) -> np.dtype:
        return self._source.dtype_of(name)

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        self._source.read(name, box, out)


def printable(text: str) -> str:
    """Returns a text from a file without what could control a terminal: that is escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def show(name: str) -> str:
    """Returns a name from a file, safe to print and of bounded length."""
    text = name if name.isprintable() and name else ascii(name)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}"
