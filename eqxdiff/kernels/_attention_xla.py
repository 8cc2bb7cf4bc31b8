"""Attention by its definition, in plain JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._dtypes import at_least_float32
from ._choice import Segments


def attend(
    q: Float[Array, "queries heads dim"],
    k: Float[Array, "keys key_heads dim"],
    v: Float[Array, "keys key_heads value_dim"],
    bias: Float[Array, "#heads #queries keys"] | None,
    key_length: Int[Array, ""] | None,
    segments: Segments | None,
    *,
    scale: float,
) -> Float[Array, "queries heads value_dim"]:
    """Computes the attention of one example, with all the scores of all heads at once."""
    wide = at_least_float32(q.dtype)
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide) * scale
    scores = add_bias(scores, bias)
    if key_length is not None:
        scores = jnp.where(jnp.arange(k.shape[0]) < key_length, scores, -jnp.inf)
    if segments is not None:
        scores = jnp.where(segments[0][:, None] == segments[1], scores, -jnp.inf)
    # Normalising after the product rounds the weights of half precision once, not twice.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("hqk,khd->qhd", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (out / total.T[:, :, None]).astype(q.dtype)


def repeat_heads(
    x: Float[Array, "keys key_heads dim"], heads: int
) -> Float[Array, "keys {heads} dim"]:
    """Repeats each head of the keys or values for the heads of queries that share it."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def add_bias(
    scores: Float[Array, "heads queries keys"], bias: Float[Array, "#heads #queries keys"] | None
) -> Float[Array, "heads queries keys"]:
    """Adds the bias in the dtype of the scores."""
    return scores if bias is None else scores + bias.astype(scores.dtype)
