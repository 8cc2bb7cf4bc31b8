import math
from functools import partial
from typing import Any, Literal

from jaxtyping import Array, Bool, Float

from ..sharding import current_mesh
from ._attention_xla import chunked_attention, plain_attention
from ._mesh import attend_on_mesh


Implementation = Literal["plain", "chunked"]

_PLAIN_BYTES = 64 * 2**20


def attention(
    q: Float[Array, "queries heads dim"],
    k: Float[Array, "keys heads dim"],
    v: Float[Array, "keys heads dim"],
    *,
    bias: Float[Array, "#heads #queries keys"] | None = None,
    mask: Bool[Array, "#heads #queries keys"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "queries heads dim"]:
    """Computes the attention of one example: `softmax(scale q k^T + bias) v` for each head.

    Scores and softmax are in at least float32; the result has the dtype of `q`.

    **Arguments:**

    - `q`, `k`, `v`: any number of queries and of keys, in one dtype.
    - `bias`: what to add to the scaled scores.
    - `mask`: `True` where a query may look. At least one key of every query must be visible.
    - `scale`: `dim ** -0.5` by default.
    - `implementation`: `"plain"` holds all scores at once, `"chunked"` the scores of some queries
        and keys at a time. By default plain up to 64 MiB of scores, and chunked beyond.

    Source: https://arxiv.org/abs/1706.03762, section 3.2.
    """
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])

    def attend(q: Array, k: Array, *rest: Any) -> Array:
        scores = 4 * q.shape[0] * q.shape[1] * k.shape[0]
        chosen = implementation or ("plain" if scores <= _PLAIN_BYTES else "chunked")
        backend = {"plain": plain_attention, "chunked": chunked_attention}[chosen]
        return backend(q, k, *rest)

    compute = attend if current_mesh() is None else partial(attend_on_mesh, attend)
    return compute(q, k, v, bias, mask, scale)
