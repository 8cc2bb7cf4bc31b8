"""cuDNN's attention, through `jax.nn`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._choice import BatchSegments, Blocks


DIFFERENTIABLE = True
"""Whether `attend` has a gradient of its own where there is no bias; else that of the chunked form
is taken."""

MOST_DIMS = 256


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
    """Computes attention with cuDNN.

    **Raises:** `NotImplementedError` for other dtypes than bfloat16 and float16, for segments, for
    heads whose dimension is no multiple of 8 or above 256, and where there is no cuDNN.
    """
    dims = q.shape[3], v.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cuDNN computes in bfloat16 or float16, not in {q.dtype}.")
    if dims[0] != dims[1] or dims[0] % 8 or dims[0] > MOST_DIMS:
        raise NotImplementedError(
            f"cuDNN takes heads of one dimension, a multiple of 8 up to {MOST_DIMS}, not {dims}."
        )
    if segments is not None:
        raise NotImplementedError("cuDNN knows no segments.")
    if bias is not None:  # which has one row for each query, in the dtype of the queries
        shape = *bias.shape[:2], q.shape[1], k.shape[1]
        bias = jnp.broadcast_to(bias.astype(q.dtype), shape)
    lengths = {}
    if key_length is not None:
        lengths["key_value_seq_lengths"] = jnp.broadcast_to(key_length, q.shape[:1])
    try:
        return jax.nn.dot_product_attention(
            q, k, v, bias, scale=scale, implementation="cudnn", **lengths
        )
    except RuntimeError as error:
        raise NotImplementedError(f"cuDNN cannot do this: {error}") from None
