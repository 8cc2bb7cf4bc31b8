"""Extraction: the difference of two models as an adapter of low rank."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .._errors import CheckpointError, SettingError
from ..checkpoint import Table, export_infos, export_tensors
from ..tensors import TensorInfo


@dataclasses.dataclass(frozen=True)
class Extracted:
    """An adapter for the difference of two models, in the format of diffusers.

    **Fields:**

    - `tensors`: by name.
    - `kept`: component -> the share of the difference's energy (its squares) that the adapter has.
    """

    tensors: Mapping[str, np.ndarray]
    kept: Mapping[str, float]


def extract(
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    tables: Mapping[str, Table],
    *,
    rank: int,
    dtype: Any = np.float32,
    bias: bool = True,
) -> Extracted:
    """Returns the adapter of a rank that comes closest to turning one model into another.

    The difference of each matrix or kernel becomes `up @ down` by its singular values, and each
    factor takes their square roots. Differences of vectors are kept in full.

    **Arguments:**

    - `base`, `tuned`: components by name, of the same shapes.
    - `tables`: the key tables that name the tensors, by component.
    - `rank`: the rank of each matrix, at most.
    - `dtype`: the dtype of the tensors.
    - `bias`: keep the changes of biases and norms, which diffusers does not read.

    **Raises:** `CheckpointError` where the models differ in more than their numbers or do not
    differ at all; `SettingError` for a rank below 1.
    """
    if rank < 1:
        raise SettingError(f"`rank` {rank} is out of range: it is at least 1.")
    tensors: dict[str, np.ndarray] = {}
    kept: dict[str, float] = {}
    for name, module in base.items():
        before, after = (export_infos(m, tables[name]) for m in (module, tuned[name]))
        if _shapes(before) != _shapes(after):
            raise CheckpointError(f"The two models have different tensors in {name}.")
        energy = rest = 0.0
        for tensor, delta in _differences(module, tuned[name], tables[name]):
            total = float(np.sum(np.square(delta, dtype=np.float64)))
            energy += total
            stem, _, parameter = f"{name}.{tensor}".rpartition(".")
            if delta.ndim > 1:
                up, down = factorize(delta, rank)
                tensors[f"{stem}.lora_A.weight"] = down.astype(dtype)
                tensors[f"{stem}.lora_B.weight"] = up.astype(dtype)
                product = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
                left = delta.reshape(product.shape) - product
                rest += float(np.sum(np.square(left, dtype=np.float64)))
            elif bias:
                ending = "diff_b" if parameter == "bias" else "diff"
                tensors[f"{stem}.{ending}"] = delta.astype(dtype)
            else:
                rest += total
        if energy > 0:
            kept[name] = 1 - rest / energy
    if not tensors:
        raise CheckpointError("The two models are the same: there is nothing to extract.")
    return Extracted(tensors, kept)


def factorize(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `up` of shape `(out, rank)` and `down` of `(rank, in)`; a kernel keeps its axes."""
    flat = delta.reshape(delta.shape[0], -1)
    u, s, vt = np.linalg.svd(flat, full_matrices=False)
    rank = min(rank, s.size)
    root = np.sqrt(s[:rank])
    up, down = u[:, :rank] * root, root[:, None] * vt[:rank]
    ones = [1] * (delta.ndim - 2)
    return up.reshape(*up.shape, *ones), down.reshape(rank, *delta.shape[1:])


def _shapes(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in infos.items()}


def _differences(base: Any, tuned: Any, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the difference of each tensor that differs."""
    after = dict(export_tensors(tuned, table))  # in an order of its own if the dtypes differ
    for tensor, before in export_tensors(base, table):
        delta = after.pop(tensor).astype(np.float32) - before.astype(np.float32)
        if delta.any():
            if not math.isfinite(float(np.abs(delta).max())):
                raise CheckpointError(f"{tensor} holds a value that is not finite.")
            yield tensor, delta
