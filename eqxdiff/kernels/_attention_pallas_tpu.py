"""A Pallas kernel of attention for TPUs: its layouts and blocks, one table for all generations."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ._attention_pallas_tpu_program import LOG2E, Tiling, program
from ._choice import BatchSegments, Blocks


DIFFERENTIABLE = False
"""Whether `attend` has a gradient of its own where there is no bias; else that of the chunked form
is taken."""

_LANES = 128


class _Chip(NamedTuple):
    """What the blocks of a kernel depend on, and the best ones for large pictures."""

    vmem: int
    """MiB of vector memory that a kernel may take."""

    depth: int
    """Rows of a matrix unit: a shorter contraction takes as long."""

    queries: int
    keys: int
    chunk: int
    """Keys whose scores one product computes."""

    step: int
    """Keys of which the maximum is taken at a time."""


_CHIPS = {
    "TPU v4": _Chip(vmem=15, depth=128, queries=512, keys=4608, chunk=512, step=512),
    "TPU v5 lite": _Chip(vmem=100, depth=128, queries=1536, keys=4608, chunk=512, step=512),
    "TPU v5": _Chip(vmem=60, depth=128, queries=1536, keys=4608, chunk=512, step=512),
    "TPU v6 lite": _Chip(vmem=100, depth=256, queries=1536, keys=4608, chunk=768, step=256),
    "TPU7x": _Chip(vmem=60, depth=256, queries=1536, keys=4608, chunk=512, step=512),
}


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
    """Computes attention. **Raises:** `NotImplementedError` for what it cannot do.

    **Arguments:**

    - `bias`: at least -1e30, which hides a key; each query sees at least one.
    - `key_length`: how many of the first keys are visible, at least one.
    - `segments`: a query sees the keys of its number.
    - `blocks`: the queries and keys of a block, by default the best for `device`.
    - `bounded`: whether no scaled score is beyond 64 on either side, so that `exp` needs no
        maximum subtracted. A bias is not included in it: where there is one, this is ignored.
    - `device`: the kind of the device, such as `"TPU v6 lite"`.
    - `interpret`: run the kernel without its device.

    Source: https://arxiv.org/abs/2205.14135, algorithm 1.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"The TPU kernel takes bfloat16 and float32, not {q.dtype}.")
    tiling = tile(q, k, v, bias, scale=scale, blocks=blocks, bounded=bounded, device=device)
    batch, heads = q.shape[0], tiling.heads
    lanes, out_lanes = tiling.pair * tiling.dim, tiling.pair * tiling.width

    def arrange(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1) if tiling.flat else x.swapaxes(1, 2)

    def block(size: int, lanes: int, index: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
        """A block of tokens of a head or a pair of heads; `index` returns the head and block."""
        if tiling.flat:
            return pl.BlockSpec(
                (None, size, lanes), lambda b, h, i, j, _: (b, *reversed(index(h, i, j)))
            )
        return pl.BlockSpec(
            (None, None, size, lanes), lambda b, h, i, j, _: (b, *index(h, i, j), 0)
        )

    hides = key_length is not None
    lengths = key_length if hides else jnp.full((1,), tiling.keys)
    own_length = lengths.shape[0] > 1
    of_query = lambda h, i, j: (h, i)
    of_key = lambda h, i, j: (h // tiling.shared, j)
    specs: list[Any] = [
        block(tiling.rows, lanes, of_query),
        block(tiling.columns, lanes, of_key),
        block(tiling.columns, out_lanes, of_key),
        None,
        None,
    ]
    if bias is not None:
        if bias.shape[2] == 1:
            bias = bias.swapaxes(2, 3)  # keys along the rows, as in the scores
        specs[3] = _bias_spec(bias, tiling)
    if segments is not None:
        segments = segments[0][:, None, :], segments[1][:, :, None]
        first = [int(x.shape[0] > 1) for x in segments]
        specs[4] = (
            pl.BlockSpec((None, 1, tiling.rows), lambda b, h, i, j, _: (first[0] * b, 0, i)),
            pl.BlockSpec((None, tiling.columns, 1), lambda b, h, i, j, _: (first[1] * b, j, 0)),
        )
    scratch = []
    if tiling.streams:
        sizes = (tiling.pair, 1), (tiling.pair, 8), (tiling.pair, tiling.width)
        scratch = [pltpu.VMEM((*size, tiling.rows), jnp.float32) for size in sizes]
    shape = (q.shape[1], heads * tiling.width) if tiling.flat else (heads, q.shape[1], tiling.width)
    out = pl.pallas_call(
        functools.partial(program, tiling=tiling, hides=hides, own_length=own_length),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(
                batch,
                pl.cdiv(heads, tiling.pair),
                pl.cdiv(tiling.queries, tiling.rows),
                pl.cdiv(tiling.keys, tiling.columns),
            ),
            in_specs=specs,
            out_specs=block(tiling.rows, out_lanes, of_query),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, *shape), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_chip(device).vmem * 2**20,
        ),
        interpret=interpret,
        name="attention",
    )(lengths.astype(jnp.int32), arrange(q), arrange(k), arrange(v), bias, segments)
    return out.reshape(*q.shape[:3], -1) if tiling.flat else out.swapaxes(1, 2)


def _chip(device: str) -> _Chip:
    """Returns the chip of this kind, or what fits each of them."""
    return _CHIPS.get(device, _CHIPS["TPU v4"])


def tile(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    *,
    scale: float,
    blocks: Blocks | None,
    bounded: bool,
    device: str,
) -> Tiling:
    """Decides the layout and the blocks. The arguments are those of `attend`."""
    chip = _chip(device)
    (_, queries, heads, dim), (_, keys, key_heads, width) = q.shape, v.shape
    pairs = dim == width == _LANES // 2 and heads == key_heads > 1
    pair = 2 if pairs else 1
    flat = pairs or dim % _LANES == 0 == width % _LANES
    rows, columns = blocks or (chip.queries, chip.keys)
    bounded = bounded and bias is None
    chunk, step = (512, 512) if bounded else (chip.chunk, chip.step)
    if blocks is None:
        if bias is not None and bias.shape[2] > 1:
            rows, columns = min(rows, 512), min(columns, 512)
        lanes, size = max(_LANES, pair * max(dim, width)), q.dtype.itemsize
        rows = max(256, rows * 2 * _LANES // (size * lanes))
        while columns > chunk and _megabytes(rows, columns, chunk, lanes, size) > chip.vmem:
            columns //= 2
    factor = scale * LOG2E
    exact = q.dtype == jnp.float32 or math.frexp(factor)[0] == 0.5
    twice = not exact and pair * dim == _LANES and chip.depth == 2 * _LANES
    rows, columns = _even(queries, rows), _even(keys, columns)
    return Tiling(
        dim=dim,
        width=width,
        heads=heads,
        shared=heads // key_heads,
        pair=pair,
        flat=flat,
        queries=queries,
        keys=keys,
        rows=rows,
        columns=columns,
        chunk=min(chunk, columns),
        step=step,
        factor=factor,
        twice=twice,
        factor_in_scores=not (exact or twice),
        bounded=bounded,
    )


def _even(tokens: int, most: int) -> int:
    """Splits tokens into as few blocks as `most` allows, of one size, which fills the lanes."""
    share = -(-tokens // -(-tokens // most))
    return -(-share // _LANES) * _LANES


def _megabytes(rows: int, columns: int, chunk: int, lanes: int, size: int) -> float:
    """Estimates the vector memory of a program: blocks come and go while another is worked on."""
    moved = 2 * size * lanes * (2 * rows + 2 * columns)
    held = 4 * rows * (2 * lanes + 2 * chunk)
    return (moved + held) / 2**20


def _bias_spec(bias: Float[Array, "..."], tiling: Tiling) -> pl.BlockSpec:
    """A block of the bias: queries by keys, or keys by one where all queries share it."""
    each, per_head = int(bias.shape[0] > 1), int(bias.shape[1] > 1)
    heads = tiling.pair if per_head else 1
    if bias.shape[3] == 1:
        size, place = (tiling.columns, 1), lambda i, j: (j, 0)
    else:
        size, place = (tiling.rows, tiling.columns), lambda i, j: (i, j)
    return pl.BlockSpec(
        (None, heads, *size), lambda b, h, i, j, _: (each * b, per_head * h, *place(i, j))
    )
