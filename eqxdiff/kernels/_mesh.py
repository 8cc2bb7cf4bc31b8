"""The one place where a kernel is spread over a mesh of devices."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from ..sharding import BATCH_AXES


def over_mesh(function: Callable[..., Array], mesh: Mesh | None) -> Callable[..., Array]:
    """Returns batched attention that each device of a mesh computes for its share.

    The batch is split over the batch axes and the heads over `tensor`, where they divide.

    **Arguments:**

    - `function`: `(q, k, v, bias, key_length, segments)` to the attention; `q` is
        `[batch, queries, heads, dim]`, and so on as of `attend` of a backend.
    """
    if mesh is None or mesh.size == 1:
        return function

    def call(q: Array, k: Array, v: Array, *others: Any) -> Array:
        axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
        ways = math.prod(mesh.shape[axis] for axis in axes)
        batch = axes if q.shape[0] % ways == 0 else None
        tensor = mesh.shape.get("tensor", 1)
        heads = "tensor" if tensor > 1 and k.shape[2] % tensor == 0 else None

        def other(x: Array) -> PartitionSpec:
            """A bias of four axes, or lengths and segments, which have no heads."""
            first = batch if x.shape[0] > 1 else None
            if x.ndim == 4:
                return PartitionSpec(first, heads if x.shape[1] > 1 else None)
            return PartitionSpec(first)

        own = PartitionSpec(batch, None, heads, None)
        specs = (own, own, own, *jax.tree.map(other, others))
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
        return mapped(q, k, v, *others)

    return call
