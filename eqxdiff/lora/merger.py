"""Merging into one component, box by box of its leaves: while they are read, or afterwards."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._errors import CheckpointError
from ..checkpoint import leaf_paths
from ..checkpoint.cast import is_finite
from ..checkpoint.plan import Move, Shape
from ..tensors.source import Box
from .components import follow
from .fitted import Fitted, Hit, ReadLeaf, chunks, is_plain, scatter
from .kinds import Rows


@dataclasses.dataclass(frozen=True, eq=False)
class _Share:
    """The part of a patch that changes a leaf, or one layer of it, at its strength."""

    hit: Hit
    move: Move
    of_bias: bool
    scale: np.float32


class Merger:
    """Adds adapters to the leaves of one component.

    The deltas are dense, in the layout of the adapter's file, and go through the table that a
    checkpoint of that layout goes through. They are summed in float32 and rounded once. The result
    does not depend on the boxes into which a leaf is cut. A few megabytes are in use at a time.
    """

    def __init__(self, fitted: Fitted, component: str, *, sign: float = 1.0):
        """**Arguments:**

        - `component`: its name; adapters need not touch it.
        - `sign`: 1 adds the adapters, -1 subtracts them.
        """
        self._name = component
        self._gains: dict[Hit, np.ndarray] = {}
        self._work: dict[str, dict[int | None, list[_Share]]] = {}
        for hit in sorted(fitted.hits.get(component, ()), key=_first):
            strength = fitted.adapters[hit.slot].strength
            for tensor in (hit.weight, hit.bias):
                for move in () if tensor is None else tensor.moves:
                    path = fitted.components[component].layer_path(move)
                    scale = np.float32(sign * strength.at(f"{component}.{path}"))
                    layers = self._work.setdefault(move.leaf, {})
                    share = _Share(hit, move, tensor is hit.bias, scale)
                    layers.setdefault(move.layer, []).append(share)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves that change, with the biases that the component does not have yet."""
        return tuple(self._work)

    def change(self, leaf: str, buffer: np.ndarray, box: Box, read: ReadLeaf) -> None:
        """Adds the adapters to a box of a leaf, in place.

        It is what `load_module` calls `change`.

        **Arguments:**

        - `read`: reads the leaves as they were: a DoRA depends on the norms of the whole weight.

        **Raises:** `CheckpointError` where a value gets too large for the dtype of the leaf.
        """
        for layer, work in self._work.get(leaf, {}).items():
            if layer is None:
                self._change_layer(leaf, buffer, box, work, read)
            elif box[0][0] <= layer < box[0][1]:
                self._change_layer(leaf, buffer[layer - box[0][0]], box[1:], work, read)

    def _change_layer(
        self,
        leaf: str,
        buffer: np.ndarray,
        box: Box,
        work: Sequence[_Share],
        read: ReadLeaf,
    ) -> None:
        (low, high), *columns = box
        ours = work[0].move.ours[1:]
        changes = [(share.move, share.scale, self._rows(share, read)) for share in work]
        for start, stop in chunks((max(share.move.high for share in work), *ours)):
            if stop <= low or start >= high:
                continue
            total = np.zeros((stop - start, *ours), np.float32)
            for move, scale, rows in changes:
                first, last = max(start, move.low), min(stop, move.high)
                if first < last:
                    total[first - start : last - start] += scale * rows(first, last)
            first, last = max(start, low), min(stop, high)
            total = total[first - start : last - start, *(slice(*bounds) for bounds in columns)]
            target = buffer[first - low : last - low]
            wide = np.promote_types(target.dtype, np.float32)
            with np.errstate(over="ignore"):
                target[...] = (target.astype(wide) + total).astype(target.dtype)
            if not is_finite(np.ascontiguousarray(target)):
                raise CheckpointError(
                    f"{self._name}.{leaf} with its adapters is too large for {target.dtype}."
                )

    def _rows(self, share: _Share, read: ReadLeaf) -> Rows:
        """The change that a share makes to the rows `start:stop` of its layer."""
        hit, move = share.hit, share.move
        if share.of_bias:
            assert hit.patch.bias is not None
            whole = scatter(move, hit.patch.bias.reshape(-1)[move.start : move.stop])
        else:
            if hit.patch.magnitude is not None and hit not in self._gains:
                self._gains[hit] = hit.gain(read)
            change = hit.change(read, self._gains.get(hit))
            shift = move.start - move.low
            if is_plain(move):
                return lambda start, stop: scatter(move, change(start + shift, stop + shift))
            whole = scatter(move, change(move.start, move.stop))
        return lambda start, stop: whole[start - move.low : stop - move.low]

    def finish(self, module: Any) -> Any:
        """Returns the component with the biases that some of its layers did not have before."""
        leaves, new = leaf_paths(module), {}
        for leaf in self._work:
            if leaf not in leaves:
                weight = leaves[f"{leaf.rpartition('.')[0]}.weight"]
                shape = weight.shape[: 1 + (None not in self._work[leaf])]
                buffer = np.zeros(shape, weight.dtype)
                self.change(leaf, buffer, whole_box(shape), _no_leaf)
                new[leaf] = put_beside(buffer, weight)
        return with_leaves(module, new)


def _first(hit: Hit) -> tuple[str, int, int]:
    tensor = hit.weight or hit.bias
    assert tensor is not None
    move = tensor.moves[0]
    return move.leaf, move.layer or 0, hit.slot


def _no_leaf(leaf: str, box: Box) -> np.ndarray:
    raise KeyError(leaf)


def whole_box(shape: Shape) -> Box:
    """Returns the box that is all of an array."""
    return tuple((0, size) for size in shape)


def with_leaves(module: Any, new: Mapping[str, Any]) -> Any:
    """Returns a module with other leaves at these paths; where there is none, `None` gives way."""
    if not new:
        return module
    where = lambda m: [follow(m, path.split(".")) for path in new]
    return eqx.tree_at(where, module, list(new.values()), is_leaf=lambda node: node is None)


def put_beside(array: np.ndarray, weight: Any, spec: PartitionSpec | None = None) -> jax.Array:
    """Puts an array on the devices of a weight.

    **Arguments:**

    - `spec`: spreads it over the weight's mesh; by default each device has all of it.
    """
    if not isinstance(weight, jax.Array) or not weight.committed:
        return jnp.asarray(array)
    if not isinstance(weight.sharding, NamedSharding):
        return jax.device_put(array, weight.sharding)
    return jax.device_put(array, NamedSharding(weight.sharding.mesh, spec or PartitionSpec()))
