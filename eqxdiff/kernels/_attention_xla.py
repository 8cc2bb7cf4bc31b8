"""Attention in plain JAX: the definition, and a form that never holds all the scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._dtypes import at_least_float32


_QUERY_BLOCK, _KEY_BLOCK = 256, 512


def plain_attention(
    q: Float[Array, "queries heads dim"],
    k: Float[Array, "keys heads dim"],
    v: Float[Array, "keys heads dim"],
    bias: Float[Array, "#heads #queries keys"] | None,
    mask: Bool[Array, "#heads #queries keys"] | None,
    scale: float,
) -> Float[Array, "queries heads dim"]:
    """Computes attention by its definition, with all the scores of all heads at once."""
    wide = at_least_float32(q.dtype)
    scores = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide) * scale
    scores = _biased(scores, bias, mask)
    # Normalising after the product rounds the weights of half precision once, not twice.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("hqk,khd->qhd", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (out / total.T[:, :, None]).astype(q.dtype)


def chunked_attention(
    q: Float[Array, "queries heads dim"],
    k: Float[Array, "keys heads dim"],
    v: Float[Array, "keys heads dim"],
    bias: Float[Array, "#heads #queries keys"] | None,
    mask: Bool[Array, "#heads #queries keys"] | None,
    scale: float,
) -> Float[Array, "queries heads dim"]:
    """Computes attention by blocks of queries and keys, with a running maximum and sum.

    Forwards and backwards only the scores of 256 queries and 512 keys exist at a time. The heads
    are a batch axis of each product, so a sharding of the heads stays as it is.

    Source: https://arxiv.org/abs/2205.14135, algorithm 1.
    """
    wide = at_least_float32(q.dtype)
    queries, heads, _ = q.shape
    keys, _, width = v.shape
    rows, columns = min(_QUERY_BLOCK, queries), min(_KEY_BLOCK, keys)
    if mask is None and keys % columns:
        mask = jnp.ones((1, 1, keys), bool)  # its padding hides the padding of the keys

    def query_blocks(x: Array) -> Array:
        if x.shape[1] == 1:  # one row for all queries
            return jnp.broadcast_to(x, (-(-queries // rows), *x.shape))
        return _blocks(x, 1, rows, mode="edge")  # a padded query sees a key, as its neighbour does

    @jax.checkpoint
    def attend(args):
        q, bias, mask = args

        @jax.checkpoint
        def step(carry, args):
            top, total, out = carry
            k, v, bias, mask = args
            scores = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=wide) * scale
            scores = _biased(scores, bias, mask)
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
        parts = jax.tree.map(lambda x: _blocks(x, 2, columns), (bias, mask))
        (_, total, out), _ = jax.lax.scan(step, carry, (k_blocks, v_blocks, *parts))
        return (out / total).astype(q.dtype)

    heads_first = lambda x: x.transpose(1, 0, 2)
    k_blocks, v_blocks = (_blocks(heads_first(x), 1, columns) for x in (k, v))
    out = jax.lax.map(attend, jax.tree.map(query_blocks, (heads_first(q), bias, mask)))
    return out.transpose(0, 2, 1, 3).reshape(-1, heads, width)[:queries]


def _biased(
    scores: Float[Array, "heads queries keys"],
    bias: Float[Array, "#heads #queries keys"] | None,
    mask: Bool[Array, "#heads #queries keys"] | None,
) -> Float[Array, "heads queries keys"]:
    """Adds the bias, and sets the scores that the mask hides to minus infinity."""
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _blocks(x: Array, axis: int, size: int, mode: str = "constant") -> Array:
    """Pads an axis to a multiple of `size` and splits it into blocks, along a new first axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, widths, mode=mode)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
