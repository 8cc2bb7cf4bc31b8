"""Attention in plain JAX: the reference, and a form that never holds all the scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._dtypes import at_least_float32


_QUERY_CHUNK = 256


def plain_attention(
    q: Float[Array, "queries heads dim"],
    k: Float[Array, "keys heads dim"],
    v: Float[Array, "keys heads dim"],
    bias: Float[Array, "#heads #queries keys"] | None,
    mask: Bool[Array, "#heads #queries keys"] | None,
    scale: float,
) -> Float[Array, "queries heads dim"]:
    """The definition, with all the scores of all heads at once."""
    wide = at_least_float32(q.dtype)
    scores = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide) * scale
    if bias is not None:
        scores = scores + bias.astype(wide)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
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
    """The same, one head and 256 queries at a time, as two-dimensional products."""
    queries, heads, _ = q.shape
    pad = -queries % _QUERY_CHUNK

    def per_head(x):
        """Broadcasts and pads a bias or mask to (heads, chunks, chunk, keys)."""
        x = jnp.broadcast_to(x, (heads, queries, k.shape[0]))
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)), mode="edge")
        return x.reshape(heads, -1, _QUERY_CHUNK, k.shape[0])

    q_chunks = jnp.pad(q, ((0, pad), (0, 0), (0, 0))).transpose(1, 0, 2)
    q_chunks = q_chunks.reshape(heads, -1, _QUERY_CHUNK, q.shape[-1])
    extras = jax.tree.map(per_head, (bias, mask))

    @jax.checkpoint
    def one_chunk(k, v, chunk):
        q, bias, mask = chunk
        one = lambda x: None if x is None else x[None]
        return plain_attention(q[:, None], k, v, one(bias), one(mask), scale)[:, 0]

    def one_head(head):
        q, k, v, extras = head
        k, v = k[:, None], v[:, None]
        return jax.lax.map(lambda chunk: one_chunk(k, v, chunk), (q, *extras))

    out = jax.lax.map(one_head, (q_chunks, k.transpose(1, 0, 2), v.transpose(1, 0, 2), extras))
    return out.reshape(heads, -1, q.shape[-1]).transpose(1, 0, 2)[:queries]
