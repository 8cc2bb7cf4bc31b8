"""Where parameters and batches live: parameter path -> logical axes -> mesh axes.

A family's rules name the logical axes of each parameter; `MESH_AXES` maps those onto the axes of a
mesh. The leading axis of stacked blocks is `"layers"` and is never split.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .distributed import reshard


Axes = tuple[str | None, ...]
Rule = tuple[str, Axes]
"""A regular expression for the whole dotted path of a parameter, and its trailing logical axes."""

BATCH_AXES = ("data", "fsdp")
"""The mesh axes that split a batch of images: weights sharded over `fsdp` are gathered as used."""

MESH_AXES: Mapping[str, str | None] = {
    "embed": "fsdp",
    "hidden": "tensor",
    "vocab": None,
    "layers": None,
}
"""Which mesh axis splits each logical axis."""


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first `data * fsdp * tensor` devices.

    **Raises:** `ValueError` where there are fewer devices.
    """
    sizes = (data, fsdp, tensor)
    count = int(np.prod(sizes))
    if count > jax.device_count():
        raise ValueError(
            f"A mesh of {count} devices needs more than the {jax.device_count()} here."
        )
    devices = np.array(jax.devices()[:count]).reshape(sizes)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def logical_axes(path: str, ndim: int, rules: Sequence[Rule]) -> Axes:
    """The logical axes of a parameter, left-filled with `"layers"` for stacked leading axes.

    Vectors need no rule; a leaf of two or more dimensions matches exactly one.

    **Raises:** `LookupError` where no rule or several match, or one names too many axes.
    """
    matches = [axes for pattern, axes in rules if re.fullmatch(pattern, path)]
    if not matches and ndim < 2:
        return (None,) * ndim
    if len(matches) != 1:
        raise LookupError(f"{path} matches {len(matches)} sharding rules, not one.")
    if len(matches[0]) > ndim:
        raise LookupError(f"{path} has {ndim} axes and its sharding rule {len(matches[0])}.")
    return ("layers",) * (ndim - len(matches[0])) + matches[0]


def parameter_sharding(
    path: str, shape: tuple[int, ...], rules: Sequence[Rule], mesh: Mesh
) -> NamedSharding:
    """The sharding of one parameter. An axis that its mesh axis does not divide stays whole."""
    spec = []
    for size, logical in zip(shape, logical_axes(path, len(shape), rules), strict=True):
        axis = MESH_AXES[logical] if logical is not None else None
        divides = axis in mesh.shape and size % mesh.shape[axis] == 0
        spec.append(axis if divides else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Splits the leading axis of every leaf over the batch axes of the mesh."""
    if mesh is None:
        return batch
    return reshard(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
