"""From a source of tensors to a module: leaf by leaf, each filled in place and cast on the way."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import DTypeLike

from .._errors import CheckpointError
from ..tensors.source import AbstractTensorSource, Box
from .cast import widest
from .plan import Move, Plan, Shape, compile_plan
from .read import Reader, check_copies, put
from .table import Table


Module = TypeVar("Module")

FILE = "file"
"""Stands for the dtypes of the file where a dtype is asked for."""

Change = Callable[[str, np.ndarray, Box, Callable[[str, Box], np.ndarray]], None]
"""Changes a box of a leaf in place before it goes to its device: `change(path, buffer, box, read)`.

`read(path, box)` reads any box of any leaf of the file, as it would be without the change.
"""


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a PyTree (or its `jax.ShapeDtypeStruct`s) by dotted path.

    A path joins attribute names, tuple indices and dictionary keys: `blocks.0.norm.weight`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {dotted(path): leaf for path, leaf in flat if is_leaf(leaf)}


def is_leaf(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(_segment(entry) for entry in path)


def _segment(entry: Any) -> str:
    match entry:
        case jax.tree_util.GetAttrKey(name=name):
            return name
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
        case jax.tree_util.DictKey(key=key) | jax.tree_util.FlattenedIndexKey(key=key):
            return str(key)
    raise TypeError(f"{entry!r} is no step of a path")


def check(
    shapes: Mapping[str, Shape], table: Table, skeleton: Any, *, name: str = "the checkpoint"
) -> None:
    """Checks by shapes alone that a file's tensors and a model's leaves make each other.

    **Arguments:**

    - `shapes`: name -> shape of every tensor in the file.
    - `skeleton`: the module, or its `eqx.filter_eval_shape`.
    - `name`: what the error calls the file.

    **Raises:** `CheckpointError`, one message with everything missing, left over or misshapen.
    """
    leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(skeleton).items()}
    compile_plan(table, leaves, shapes, name=name)


def load_module(
    source: AbstractTensorSource,
    table: Table,
    skeleton: Module,
    *,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
    name: str = "the checkpoint",
    progress: Callable[[int, int], None] | None = None,
    change: Change | None = None,
) -> Module:
    """Makes the module of which `skeleton` is the shape.

    Each leaf is filled in place, part by part, in its final dtype, and placed before the next is
    begun, so that little more than the parameters themselves is ever in memory.

    **Arguments:**

    - `skeleton`: `eqx.filter_eval_shape` of the module's `init`; all but its arrays is kept.
    - `dtype`: of every floating point leaf. `None` stands for the dtypes of the skeleton, and
      `"file"` for those of the file: a leaf made of several tensors has the widest of their dtypes,
      and numbers in 8 bits are kept in bfloat16.
    - `sharding`: a `jax.sharding.Sharding` for every leaf; or a function from a leaf's path and
      shape to one; or a PyTree of them like the skeleton; `None` for the default device. Each
      process reads only what its own devices hold.
    - `name`: what errors call the file.
    - `progress`: called now and then with the bytes done and the bytes in all.
    - `change`: changes each box of each leaf in place after it is read. A leaf is one box, or one
      for each different shard that this process holds.

    **Raises:** `CheckpointError` where the file is damaged, does not hold exactly the tensors that
    the table asks for in the right shapes, or holds a value that is not finite.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    leaves = leaf_paths(skeleton)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    plan, dtypes = _planned(source, table, leaves, dtype, name)
    _check_kinds(plan, source, dtypes, name)
    check_copies(source, plan, name)
    place = _placement(sharding, skeleton)
    nbytes = {path: math.prod(shape) * dtypes[path].itemsize for path, shape in shapes.items()}
    total, done, values, arriving = sum(nbytes.values()), 0, [], []

    told = 0

    def advance(count: int) -> None:
        nonlocal told
        told = max(told, min(done + count, total))  # each shard of a leaf counts from its start
        if progress is not None:
            progress(told, total)

    with Reader(source, name, advance) as reader, Reader(source, name) as silent:
        read = lambda leaf, box: silent.fill(plan, leaf, box, dtypes[leaf])

        def fill(leaf: str, box: Box) -> np.ndarray:
            buffer = reader.fill(plan, leaf, box, dtypes[leaf])
            if change is not None:
                change(leaf, buffer, box, read)
            return buffer

        for entries, leaf in flat:
            if not is_leaf(leaf):
                values.append(leaf)
                continue
            path = dotted(entries)
            array = _load_leaf(fill, path, shapes[path], place)
            # one leaf may be on its way to a device while the next is read, not more
            jax.block_until_ready(arriving)
            arriving = [array]
            values.append(array)
            done += nbytes[path]
            advance(0)
    return jax.tree_util.tree_unflatten(treedef, jax.block_until_ready(values))


def loaded_shapes(
    source: AbstractTensorSource,
    table: Table,
    skeleton: Module,
    *,
    dtype: DTypeLike | None = None,
    name: str = "the checkpoint",
) -> Module:
    """Returns the shapes and dtypes of the module that `load_module` would make.

    Of the file nothing but its header is read. **Raises:** `CheckpointError`.
    """
    _, dtypes = _planned(source, table, leaf_paths(skeleton), dtype, name)

    def typed(path: tuple[Any, ...], leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, dtypes[dotted(path)]) if is_leaf(leaf) else leaf

    return jax.tree_util.tree_map_with_path(typed, skeleton)


def _planned(
    source: AbstractTensorSource,
    table: Table,
    leaves: Mapping[str, Any],
    dtype: DTypeLike | None,
    name: str,
) -> tuple[Plan, dict[str, np.dtype]]:
    """Returns which tensors make each leaf, and the dtype that it is kept in."""
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    file = {tensor: info.shape for tensor, info in source.tensors.items()}
    plan = compile_plan(table, shapes, file, name=name)
    dtypes = {
        path: _leaf_dtype(np.dtype(leaf.dtype), dtype, source, plan.moves.get(path, ()))
        for path, leaf in leaves.items()
    }
    return plan, dtypes


def _leaf_dtype(
    own: np.dtype, wanted: DTypeLike | None, source: AbstractTensorSource, moves: Sequence[Move]
) -> np.dtype:
    """Returns the dtype that a leaf is kept in; `own` is its dtype in the skeleton."""
    if wanted is None or not jax.numpy.issubdtype(own, jax.numpy.floating):
        return own
    if not (isinstance(wanted, str) and wanted == FILE):
        return np.dtype(wanted)
    found = [source.dtype_of(tensor) for tensor in dict.fromkeys(move.tensor for move in moves)]
    wide = [dtype if dtype.itemsize > 1 else np.dtype(jax.numpy.bfloat16) for dtype in found]
    return np.dtype(jax.dtypes.canonicalize_dtype(widest(wide or [source.dtype])))


def _check_kinds(
    plan: Plan, source: AbstractTensorSource, dtypes: Mapping[str, np.dtype], name: str
) -> None:
    for leaf, moves in plan.moves.items():
        wanted = jax.numpy.issubdtype(dtypes[leaf], jax.numpy.floating)
        for move in moves:
            got = source.tensors[move.tensor].dtype
            if jax.numpy.issubdtype(got, jax.numpy.floating) != wanted:
                raise CheckpointError(
                    f"{name}: {move.tensor} holds {got} numbers where the model has {dtypes[leaf]}."
                )


def _placement(sharding: Any, skeleton: Any) -> Callable[[str, Shape], Any]:
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return lambda path, shape: sharding
    if callable(sharding) and not isinstance(sharding, type(skeleton)):
        return sharding
    flat, _ = jax.tree_util.tree_flatten_with_path(sharding)
    by_path = {dotted(path): value for path, value in flat}
    return lambda path, shape: by_path[path]


def _load_leaf(
    fill: Callable[[str, Box], np.ndarray],
    leaf: str,
    shape: Shape,
    place: Callable[[str, Shape], Any],
) -> jax.Array:
    sharding = place(leaf, shape)
    if sharding is None:
        return put(fill(leaf, tuple((0, size) for size in shape)), None)
    boxes: dict[Box, list[Any]] = {}
    for device, slices in sharding.addressable_devices_indices_map(shape).items():
        index = tuple(s.indices(size)[:2] for s, size in zip(slices, shape, strict=True))
        boxes.setdefault(index, []).append(device)
    shards = []
    for index, devices in boxes.items():
        buffer = fill(leaf, index)
        shards += [put(buffer, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
