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
CPU_BLOCKS = 1152, 1152


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
    """Computes attention on one device: on a CPU one head of one example after the other, whose
    products of two matrices are several times faster than those with a batch axis."""
    batch, heads = q.shape[0], q.shape[2]
    if device != "cpu":
        one = functools.partial(attend_one, scale=scale, blocks=blocks)
        same = lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:]))
        return jax.vmap(one)(q, k, v, *jax.tree.map(same, (bias, key_length, segments)))
    shared = heads // k.shape[2]

    def head(index: Int[Array, ""], out: Array) -> Array:
        example, number = index // heads, index % heads
        own = lambda x: x[jnp.where(x.shape[0] == 1, 0, example)]
        part = None if bias is None else own(bias)
        if part is not None:
            part = part[jnp.where(part.shape[0] == 1, 0, number)]
        length, ids = jax.tree.map(own, (key_length, segments))
        own_k, own_v = (x[example, :, number // shared] for x in (k, v))
        made = _attend_head(
            q[example, :, number], own_k, own_v, part, length, ids, scale, blocks or CPU_BLOCKS
        )
        return out.at[example, :, number].set(made)

    empty = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    return jax.lax.fori_loop(0, batch * heads, head, empty)


def _attend_head(
    q: Float[Array, "queries dim"],
    k: Float[Array, "keys dim"],
    v: Float[Array, "keys value_dim"],
    bias: Float[Array, "#queries keys"] | None,
    key_length: Int[Array, ""] | None,
    segments: Segments | None,
    scale: float,
    blocks: Blocks,
) -> Float[Array, "queries value_dim"]:
    """Computes the attention of one head by blocks. It is made for the forward pass."""
    wide = at_least_float32(q.dtype)
    (queries, _), (keys, width) = q.shape, v.shape
    rows, columns = (_even(*pair) for pair in zip((queries, keys), blocks, strict=True))
    lines, seen = (None, None) if segments is None else segments
    if key_length is None and keys % columns:
        key_length = jnp.asarray(keys)  # hides the padding
    numbers = None if key_length is None else jnp.arange(-(-keys // columns) * columns)

    def block(args: Any) -> Float[Array, "rows value_dim"]:
        q, bias, lines = args
        q = q.astype(wide) * scale

        def score(k: Array, bias: Any, numbers: Any, seen: Any) -> Float[Array, "rows keys"]:
            scores = q @ k.astype(wide).T
            if bias is not None:
                scores = scores + bias.astype(wide)
            if numbers is not None:
                scores = jnp.where(numbers < key_length, scores, -jnp.inf)
            if lines is not None:
                scores = jnp.where(lines[:, None] == seen, scores, -jnp.inf)
            return scores

        if columns == keys:
            scores = score(k, bias, numbers, seen)
            weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
            total = jnp.sum(weights, axis=1, keepdims=True)
            return (weights @ v.astype(wide) / total).astype(v.dtype)

        def step(carry: Any, args: Any) -> tuple[Any, None]:
            top, total, out = carry
            k, v, *others = args
            scores = score(k, *others)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            weights, decay = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = decay * total + jnp.sum(weights, axis=1, keepdims=True)
            return (new_top, total, decay * out + weights @ v.astype(wide)), None

        top = jnp.full((q.shape[0], 1), jnp.finfo(wide).min, wide)
        carry = top, jnp.zeros_like(top), jnp.zeros((q.shape[0], width), wide)
        parts = None if bias is None else _blocks(bias, 1, columns)
        others = (None if x is None else _blocks(x, 0, columns) for x in (numbers, seen))
        pairs = (_blocks(x, 0, columns) for x in (k, v))
        (_, total, out), _ = jax.lax.scan(step, carry, (*pairs, parts, *others))
        return (out / total).astype(v.dtype)

    if rows == queries:
        return block((q, bias, lines))
    shared = bias is not None and bias.shape[0] == 1  # one row for all queries
    turns = jax.tree.map(
        lambda x: _blocks(x, 0, rows, mode="edge"), (q, None if shared else bias, lines)
    )
    out = jax.lax.map(lambda turn: block((turn[0], bias if shared else turn[1], turn[2])), turns)
    return out.reshape(-1, width)[:queries]


def _even(total: int, size: int) -> int:
    """Returns the size of equal blocks of about `size`, without padding where that is possible."""
    count = -(-total // size)
    exact = (total // n for n in range(count, 2 * count + 1) if total % n == 0)
    return next(exact, -(-total // count))


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
