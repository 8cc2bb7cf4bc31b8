"""A Pallas kernel of attention for GPUs, in the form that Triton compiles.

It does what cuDNN refuses: float32, heads of any dimension up to 512, segments.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ._choice import BatchSegments, Blocks


DIFFERENTIABLE = False
MOST_DIMS = 512
LEAST = 16
"""The smallest side of a matrix in a product of Triton."""


def attend(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys key_heads dim"],
    v: Float[Array, "batch keys key_heads value_dim"],
    bias: Float[Array, "#batch #heads #queries keys"] | None,
    key_length: Int[Array, "#batch"] | None,
    segments: BatchSegments | None,
    *,
    scale: float,
    blocks: Blocks | None,
    bounded: bool,
    device: str,
    interpret: bool,
) -> Float[Array, "batch queries heads value_dim"]:
    """Computes attention block by block on chip, with a running maximum and sum.

    **Raises:** `NotImplementedError` for float64, for heads of more than 512 dimensions, and where
    there is no GPU.

    Source: https://arxiv.org/abs/2307.08691, algorithm 1.
    """
    batch, queries, heads, dim = q.shape
    keys, key_heads, width = *k.shape[1:3], v.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"The kernel computes no {q.dtype}.")
    if max(dim, width) > MOST_DIMS:
        raise NotImplementedError(
            f"The kernel takes heads of up to {MOST_DIMS} dimensions, not {max(dim, width)}."
        )
    if device == "cpu" and not interpret:
        raise NotImplementedError("The kernel needs a GPU.")
    # Triton's blocks are powers of two.
    dims = max(LEAST, pl.next_power_of_2(dim)), max(LEAST, pl.next_power_of_2(width))
    rows, columns = (
        max(LEAST, min(pl.next_power_of_2(size), pl.next_power_of_2(total)))
        for size, total in zip(
            blocks or _blocks(max(dims), q.dtype.itemsize), (queries, keys), strict=True
        )
    )
    if key_length is None and keys % columns:
        key_length = jnp.full((1,), keys)  # hides the padding
    q = _padded(q, {1: rows, 3: dims[0]})
    k, v = (_padded(x, {1: columns, 3: size}) for x, size in zip((k, v), dims, strict=True))
    if bias is not None:
        bias = _padded(bias, {3: columns} | ({} if bias.shape[2] == 1 else {2: rows}))
    length = None if key_length is None else key_length.astype(jnp.int32)[:, None]
    ids = (
        None
        if segments is None
        else [
            _padded(x.astype(jnp.int32), {1: size})
            for x, size in zip(segments, (rows, columns), strict=True)
        ]
    )

    own = lambda x, b: 0 if x.shape[0] == 1 else b
    whole = k.shape[1]

    def spec(x: Array, axis: int, block: int) -> pl.BlockSpec:
        """A whole row of `x` for each example, but for blocks of queries along `axis`."""
        shape = (None, *(block if i == axis else n for i, n in enumerate(x.shape[1:], 1)))
        index = lambda i, b, h: (own(x, b), *(i if j == axis else 0 for j in range(1, x.ndim)))
        return pl.BlockSpec(shape, index)

    query = lambda size: pl.BlockSpec((None, rows, None, size), lambda i, b, h: (b, i, h, 0))
    shared = heads // key_heads
    key = lambda size: pl.BlockSpec(
        (None, whole, None, size), lambda i, b, h: (b, 0, h // shared, 0)
    )
    bias_spec = None
    if bias is not None:
        one_head, one_row = bias.shape[1] == 1, bias.shape[2] == 1
        bias_spec = pl.BlockSpec(
            (None, None, 1 if one_row else rows, whole),
            lambda i, b, h: (own(bias, b), 0 if one_head else h, 0 if one_row else i, 0),
        )
    specs = (
        query(dims[0]),
        key(dims[0]),
        key(dims[1]),
        bias_spec,
        None if length is None else spec(length, 0, 1),
        None if ids is None else spec(ids[0], 1, rows),
        None if ids is None else spec(ids[1], 0, 1),
    )
    args = q, k, v, bias, length, *(ids or (None, None))
    out = pl.pallas_call(
        functools.partial(_kernel, scale=scale * math.log2(math.e), columns=columns),
        grid=(q.shape[1] // rows, batch, heads),
        in_specs=specs,
        out_specs=query(dims[1]),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:3], dims[1]), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8 if max(dims) > 64 else 4, num_stages=2),
        interpret=interpret,
        name="attention",
    )(*args)
    return out[:, :queries, :, :width]


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    bias_ref: Any,
    length_ref: Any,
    lines_ref: Any,
    seen_ref: Any,
    out_ref: Any,
    *,
    scale: float,
    columns: int,
) -> None:
    """Computes a block of queries of one head. Scores are in units of log 2."""
    q = q_ref[...]
    lines = None if lines_ref is None else lines_ref[...]
    length = k_ref.shape[0] if length_ref is None else length_ref[0]
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def product(x: Array, y: Array) -> Array:
        return jnp.dot(x, y, precision=exact, preferred_element_type=jnp.float32)

    def step(index: Any, carry: Any) -> Any:
        top, total, out = carry
        place = pl.dslice(index * columns, columns)
        scores = product(q, k_ref[place, :].T) * scale
        if bias_ref is not None:
            scores += bias_ref[:, place].astype(jnp.float32) * math.log2(math.e)
        if length_ref is not None:
            number = index * columns + jnp.arange(columns)
            scores = jnp.where((number < length)[None, :], scores, -jnp.inf)
        if lines is not None:
            scores = jnp.where(lines[:, None] == seen_ref[place][None, :], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, decay = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        v = v_ref[place, :]
        out = decay[:, None] * out + product(weights.astype(v.dtype), v)
        return new_top, decay * total + jnp.sum(weights, axis=1), out

    # The lowest finite maximum, not -inf, because a block may hide all its keys from a query.
    rows = q.shape[0]
    top = jnp.full((rows,), jnp.finfo(jnp.float32).min)
    start = top, jnp.zeros((rows,)), jnp.zeros(out_ref.shape, jnp.float32)
    steps = (length + columns - 1) // columns
    _, total, out = jax.lax.fori_loop(0, steps, step, start)
    total = jnp.where(total == 0, 1, total)  # of a padded query, which may see nothing
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)


def _blocks(dim: int, itemsize: int) -> Blocks:
    """Returns the queries and keys of a block whose arrays fit the registers and shared memory of
    all GPUs with 100 KB of it."""
    if itemsize == 4:
        return (64, 32) if dim <= 128 else (32, 16)
    if dim <= 128:
        return 128, 64
    return (64, 32) if dim <= 256 else (32, 32)


def _padded(x: Array, sizes: dict[int, int]) -> Array:
    """Pads axes with zeros to multiples of some sizes."""
    return jnp.pad(x, [(0, -n % sizes.get(axis, 1)) for axis, n in enumerate(x.shape)])
