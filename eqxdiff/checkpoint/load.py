"""From a source of tensors to a module: leaf by leaf, each filled in place and cast on the way."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import DTypeLike

from .._errors import CheckpointError
from .plan import Move, Plan, Shape, compile_plan
from .source import AbstractTensorSource, Index
from .table import Table


Module = TypeVar("Module")

CHUNK_BYTES = 4 << 20
"""A tensor is read, checked and cast in pieces of this size, which stay in the cache."""


def leaf_paths(tree: Any) -> dict[str, Any]:
    """The arrays of a PyTree (or its `jax.ShapeDtypeStruct`s) by dotted path.

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
) -> Module:
    """Makes the module of which `skeleton` is the shape.

    Each leaf is filled in place, part by part, in its final dtype, and placed before the next is
    begun, so that little more than the parameters themselves is ever in memory.

    **Arguments:**

    - `skeleton`: `eqx.filter_eval_shape` of the module's `init`; all but its arrays is kept.
    - `dtype`: of every floating point leaf; `None` for those of the skeleton.
    - `sharding`: a `jax.sharding.Sharding` for every leaf; or a function from a leaf's path and
      shape to one; or a PyTree of them like the skeleton; `None` for the default device. Each
      process reads only what its own devices hold.
    - `name`: what errors call the file.
    - `progress`: called with the bytes done and the bytes in all, after each leaf.

    **Raises:** `CheckpointError` where the file is damaged, does not hold exactly the tensors that
    the table asks for in the right shapes, or holds a value that is not finite.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    leaves = leaf_paths(skeleton)
    infos = source.tensors
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    file = {tensor: info.shape for tensor, info in infos.items()}
    plan = compile_plan(table, shapes, file, name=name)
    dtypes = {path: _leaf_dtype(leaf.dtype, dtype) for path, leaf in leaves.items()}
    _check_kinds(plan, source, dtypes, name)
    check_copies(source, plan, name)
    place = _placement(sharding, skeleton)
    total = sum(math.prod(shape) * dtypes[path].itemsize for path, shape in shapes.items())
    done, values = 0, []
    for path_entries, leaf in flat:
        if not is_leaf(leaf):
            values.append(leaf)
            continue
        path = dotted(path_entries)
        values.append(_load_leaf(source, plan, path, shapes[path], dtypes[path], place, name))
        done += math.prod(shapes[path]) * dtypes[path].itemsize
        if progress is not None:
            progress(done, total)
    return jax.tree_util.tree_unflatten(treedef, values)


def _leaf_dtype(own: Any, wanted: DTypeLike | None) -> np.dtype:
    own = np.dtype(own)
    floating = jax.numpy.issubdtype(own, jax.numpy.floating)
    return np.dtype(wanted) if wanted is not None and floating else own


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
    source: AbstractTensorSource,
    plan: Plan,
    leaf: str,
    shape: Shape,
    dtype: np.dtype,
    place: Callable[[str, Shape], Any],
    name: str,
) -> jax.Array:
    sharding = place(leaf, shape)

    def fill(index: Index) -> np.ndarray:
        return _fill_leaf(source, plan, leaf, index, dtype, name)

    if sharding is None:
        return put(fill(tuple((0, size) for size in shape)), None)
    boxes: dict[Index, list[Any]] = {}
    for device, slices in sharding.addressable_devices_indices_map(shape).items():
        index = tuple(s.indices(size)[:2] for s, size in zip(slices, shape, strict=True))
        boxes.setdefault(index, []).append(device)
    shards = []
    for index, devices in boxes.items():
        buffer = fill(index)
        shards += [put(buffer, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that a CPU device can take over as it is."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def put(buffer: np.ndarray, device: Any) -> jax.Array:
    """Gives an array that nobody will write to again to a device; a CPU does not copy it."""
    return jax.device_put(buffer, device, may_alias=True)


def _fill_leaf(
    source: AbstractTensorSource, plan: Plan, leaf: str, index: Index, dtype: np.dtype, name: str
) -> np.ndarray:
    """The box `index` of a leaf."""
    buffer = aligned_empty(tuple(stop - start for start, stop in index), dtype)
    for layer, value in plan.fills.get(leaf, ()):
        _layer(buffer, layer, index)[0][...] = dtype.type(value)
    for move in plan.moves.get(leaf, ()):
        target, box = _layer(buffer, move.layer, index)
        if target.size and (part := _overlap(move, target, box)) is not None:
            _read_piece(source, move, *part, name=name)
    return buffer


def _layer(buffer: np.ndarray, layer: int | None, index: Index) -> tuple[np.ndarray, Index]:
    """The part of a leaf's box that belongs to a layer, and that part's bounds in the layer."""
    if layer is None:
        return buffer, index
    start, stop = index[0]
    if not start <= layer < stop:
        return buffer[:0], index[1:]
    return buffer[layer - start], index[1:]


def _overlap(move: Move, target: np.ndarray, box: Index) -> tuple[np.ndarray, Index] | None:
    """What a move gives to `target`, the box of a layer: where it goes, and bounds in `ours`."""
    if not box:
        return target, box
    start, stop = max(move.low, box[0][0]), min(move.high, box[0][1])
    if start >= stop:
        return None
    rows = target[start - box[0][0] : stop - box[0][0]]
    return rows, ((start - move.low, stop - move.low), *box[1:])


def _read_piece(
    source: AbstractTensorSource, move: Move, out: np.ndarray, box: Index, *, name: str
) -> None:
    """Fills `out` with the box of what a move yields, `box` in coordinates of `move.ours`."""
    if move.axes is not None:
        order = np.argsort(move.axes)
        out, box = out.transpose(order), tuple(box[i] for i in order)
    if move.theirs != move.between:
        whole = np.empty(move.theirs, out.dtype)
        _read_box(source, move, whole, tuple((0, size) for size in move.theirs), name)
        out[...] = whole.reshape(move.between)[tuple(slice(*bounds) for bounds in box)]
    else:
        _read_box(source, move, out, box, name)


def _read_box(
    source: AbstractTensorSource, move: Move, out: np.ndarray, box: Index, name: str
) -> None:
    """Fills `out` with a box of a move's rows of its tensor, in pieces that stay in cache."""
    info = source.tensors[move.tensor]
    if not box:
        pieces = [(out, box)]
    else:
        low, high = (move.start + bound for bound in box[0])
        row = max(math.prod(stop - start for start, stop in box[1:]) * info.dtype.itemsize, 1)
        step = max(CHUNK_BYTES // row, 1)
        pieces = [
            (out[a - low : a - low + step], ((a, min(a + step, high)), *box[1:]))
            for a in range(low, high, step)
        ]
    direct = info.dtype == out.dtype and move.scale is None
    scratch = np.empty(0, info.dtype)
    for target, bounds in pieces:
        in_place = direct and target.flags.c_contiguous
        if in_place:
            piece = target
        else:
            if scratch.size < target.size:
                scratch = np.empty(target.size, info.dtype)
            piece = scratch[: target.size].reshape(target.shape)
        source.read(move.tensor, bounds, piece)
        if not is_finite(piece):
            raise CheckpointError(f"{name}: {move.tensor} holds a value that is not finite.")
        if not in_place:
            if move.scale is not None:
                wide = np.promote_types(piece.dtype, np.float32)
                piece = piece.astype(wide) * wide.type(move.scale)
            target[...] = piece.astype(out.dtype, copy=False)


def is_finite(array: np.ndarray) -> bool:
    """Whether a contiguous array has neither infinities nor NaNs; integers never do."""
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating) or not array.size:
        return True
    if array.dtype.itemsize == 1:
        return bool(np.isfinite(array.astype(np.float32)).all())
    # Exponents of all ones are the greatest bit patterns of either sign, so two integer maxima
    # say it, faster than any test of floats and without memory.
    bits = array.dtype.itemsize * 8
    infinity = int(np.array(np.inf, array.dtype).view(f"u{bits // 8}"))
    signed = array.view(f"i{bits // 8}").max()
    unsigned = array.view(f"u{bits // 8}").max()
    return bool(signed < infinity and unsigned < infinity + (1 << (bits - 1)))


def check_copies(source: AbstractTensorSource, plan: Plan, name: str) -> None:
    """A tensor under two names in one file must be the same tensor.

    **Raises:** `CheckpointError`.
    """
    for copy, original in plan.copies.items():
        first, second = source.tensors[copy], source.tensors[original]
        row = max(math.prod(first.shape[1:]) * max(first.dtype.itemsize, second.dtype.itemsize), 1)
        step = max(CHUNK_BYTES // row, 1)
        heads = [(a, min(a + step, first.shape[0])) for a in range(0, (*first.shape, 1)[0], step)]
        for head in heads:
            box = (head, *((0, size) for size in first.shape[1:])) if first.shape else ()
            shape = tuple(stop - start for start, stop in box)
            one, two = np.empty(shape, first.dtype), np.empty(shape, second.dtype)
            source.read(copy, box, one)
            source.read(original, box, two)
            if not np.array_equal(one, two):
                raise CheckpointError(f"{name}: {copy} and {original} should be equal and differ.")
