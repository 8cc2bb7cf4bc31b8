"""Attention in plain JAX that never holds all the scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._dtypes import at_least_float32
from ._attention_xla import add_bias, repeat_heads
from ._choice import BatchSegments, Blocks, Segments


DIFFERENTIABLE = False
BLOCKS = 256, 512


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
    """Computes attention by blocks on one device."""
    one = functools.partial(attend_one, scale=scale, blocks=blocks)
    same = lambda x: jnp.broadcast_to(x, (q.shape[0], *x.shape[1:]))
    return jax.vmap(one)(q, k, v, *jax.tree.map(same, (bias, key_length, segments)))


def attend_one(
    q: Float[Array, "queries heads dim"],
    k: Float[Array, "keys key_heads dim"],
    v: Float[Array, "keys key_heads value_dim"],
    bias: Float[Array, "#heads #queries keys"] | None,
    key_length: Int[Array, ""] | None,
    segments: Segments | None,
    *,
    scale: float,
    blocks: Blocks | None,
) -> Float[Array, "queries heads value_dim"]:
    """Computes the attention of one example by blocks, with a running maximum and sum.

    Forwards and backwards only the scores of a block of queries and of keys exist at a time. The
    heads are a batch axis of each product, so a sharding of the heads stays as it is.

    Source: https://arxiv.org/abs/2205.14135, algorithm 1.
    """
    wide = at_least_float32(q.dtype)
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    queries, heads, _ = q.shape
    keys, _, width = v.shape
    rows, columns = (min(*pair) for pair in zip(blocks or BLOCKS, (queries, keys), strict=True))
    if key_length is None and keys % columns:
        key_length = jnp.asarray(keys)  # hides the padding
    lines, seen = (None, None) if segments is None else segments
    numbers = None if key_length is None else jnp.arange(-(-keys // columns) * columns)

    def query_blocks(x: Array) -> Array:
        if x.shape[1] == 1 and queries > 1:  # one row for all queries
            return jnp.broadcast_to(x, (-(-queries // rows), *x.shape))
        return _blocks(x, 1, rows, mode="edge")  # a padded query sees a key, as its neighbour does

    @jax.checkpoint
    def attend(args: Any) -> Array:
        q, bias, lines = args

        @jax.checkpoint
        def step(carry: Any, args: Any) -> tuple[Any, None]:
            top, total, out = carry
            k, v, bias, numbers, seen = args
            scores = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=wide) * scale
            scores = add_bias(scores, bias)
            if numbers is not None:
                scores = jnp.where(numbers < key_length, scores, -jnp.inf)
            if lines is not None:
                scores = jnp.where(lines[0, :, None] == seen, scores, -jnp.inf)
            highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
            new_top = jnp.maximum(top, highest)
            weights, decay = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = decay * total + jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights.astype(v.dtype)
            part = jnp.einsum("hqk,hkd->hqd", weights, v, preferred_element_type=wide)
            return (new_top, total, decay * out + part), None

        # The lowest finite maximum, not -inf, because a block may hide all its keys from a query.
        top = jnp.full((heads, rows, 1), jnp.finfo(wide).min, wide)
        carry = top, jnp.zeros_like(top), jnp.zeros((heads, rows, width), wide)
        part = None if bias is None else _blocks(bias, 2, columns)
        (_, total, out), _ = jax.lax.scan(step, carry, (k_blocks, v_blocks, part, *key_parts))
        return (out / total).astype(q.dtype)

    heads_first = lambda x: x.transpose(1, 0, 2)
    k_blocks, v_blocks = (_blocks(heads_first(x), 1, columns) for x in (k, v))
    key_parts = (
        None if numbers is None else numbers.reshape(-1, columns),
        None if seen is None else _blocks(seen, 0, columns, mode="edge"),
    )
    parts = heads_first(q), bias, None if lines is None else lines[None]
    out = jax.lax.map(attend, jax.tree.map(query_blocks, parts))
    return out.transpose(0, 2, 1, 3).reshape(-1, heads, width)[:queries]


def _blocks(x: Array, axis: int, size: int, mode: str = "constant") -> Array:
    """Pads an axis to a multiple of `size` and splits it into blocks, along a new first axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, widths, mode=mode)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
