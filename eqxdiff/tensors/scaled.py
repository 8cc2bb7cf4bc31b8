"""Weights in 8 bits with a scale beside them, as ComfyUI stores them."""

import json
from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from .._errors import CheckpointError
from .source import AbstractTensorSource, Box, TensorInfo, show


SCALES = {"scale_weight": "weight", "weight_scale": "weight"}
"""The name of a scale -> the name of the weight beside it."""

UNUSED = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
"""Names of what serves to compute in 8 bits: eqxdiff computes in wider numbers."""

EIGHT_BITS = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


def dequantised(tensors: AbstractTensorSource) -> AbstractTensorSource:
    """Multiplies the tensors in 8 bits by their scales, and leaves all others untouched.

    **Raises:** `CheckpointError` where a scale belongs to nothing, or to what is not in 8 bits.
    """
    infos = tensors.tensors
    scales = {}
    for name in infos:
        head, _, last = name.rpartition(".")
        if last in SCALES:
            scales[f"{head}.{SCALES[last]}" if head else SCALES[last]] = name
    if not scales:
        marked = [name for name in infos if name.rpartition(".")[2] == "scaled_fp8"]
        if not marked:
            return tensors
    return Dequantised(tensors, scales)


class Dequantised(AbstractTensorSource):
    """The source that `dequantised` returns.

    A scaled tensor is read in float32 and kept in bfloat16.
    """

    def __init__(self, source: AbstractTensorSource, scales: Mapping[str, str]):
        infos = source.tensors
        for name, scale in scales.items():
            self._check(infos, name, scale)
        self._source = source
        self._scales = {name: _read(source, scale) for name, scale in scales.items()}
        hidden = set(scales.values())
        self._check_kinds(source)
        self._tensors = {
            name: TensorInfo(info.shape, np.dtype(np.float32)) if name in scales else info
            for name, info in infos.items()
            if name not in hidden and name.rpartition(".")[2] not in UNUSED
        }

    @staticmethod
    def _check(infos: Mapping[str, TensorInfo], name: str, scale: str) -> None:
        if name not in infos:
            raise CheckpointError(f"{show(scale)} is the scale of {show(name)}, which is missing.")
        info, shape = infos[name], infos[scale].shape
        if info.dtype not in EIGHT_BITS:
            raise CheckpointError(
                f"{show(name)} has a scale and holds {info.dtype}: only float8 is supported."
            )
        rows = info.shape[0] if info.shape else 1
        if shape not in ((), (1,), (rows,), (rows, *(1 for _ in info.shape[1:]))):
            raise CheckpointError(
                f"{show(scale)} has the shape {shape}: one scale in all or one a row is supported."
            )

    @staticmethod
    def _check_kinds(source: AbstractTensorSource) -> None:
        """Refuses other formats than float8. **Raises:** `CheckpointError`."""
        for name, info in source.tensors.items():
            if name.rpartition(".")[2] != "comfy_quant" or info.nbytes > 4096:
                continue
            try:
                kind = json.loads(_read(source, name).tobytes())["format"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise CheckpointError(f"{show(name)} is damaged: it names no format.") from None
            if kind not in ("float8_e4m3fn", "float8_e5m2"):
                raise CheckpointError(
                    f"{show(name)} is in the format {show(str(kind))}: only float8 is supported."
                )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def dtype_of(self, name: str) -> np.dtype:
        return np.dtype(jnp.bfloat16) if name in self._scales else self._tensors[name].dtype

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        if name not in self._scales:
            self._source.read(name, box, out)
            return
        scale = self._scales[name].astype(np.float32).reshape(-1)
        if scale.size > 1:
            scale = scale[slice(*box[0])].reshape(-1, *(1 for _ in box[1:]))
        raw = np.empty(out.shape, self._source.tensors[name].dtype)
        self._source.read(name, box, raw)
        out[...] = raw.astype(np.float32) * (scale if scale.size > 1 else scale.reshape(()))


def _read(source: AbstractTensorSource, name: str) -> np.ndarray:
    info = source.tensors[name]
    out = np.empty(info.shape, info.dtype)
    source.read(name, tuple((0, size) for size in info.shape), out)
    return out
