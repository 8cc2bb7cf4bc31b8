"""The program of the TPU kernel of attention: one block of queries meets one block of keys.

It computes `k q^T`, so that queries lie along the lanes of the vector unit: the maximum and the sum
over keys are elementwise operations of whole registers, and the matrix unit takes the weights
`exp(k q^T)` as they are for the product `v^T exp(k q^T)`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float


LOG2E = math.log2(math.e)
_LOWEST = -1e30
"""The maximum before the first key: finite, because a block may hide all its keys from a query."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static part of a call.

    **Fields:**

    - `dim`, `width`: of a head of keys, and of values.
    - `heads`, `shared`: of the queries, and how many of them share a head of keys.
    - `pair`: the heads of a program. Two of 64 fill the lanes.
    - `flat`: arrays are `(batch, tokens, heads * dim)`, else `(batch, heads, tokens, dim)`.
    - `queries`, `keys`: of the call; `rows`, `columns`: those of a block.
    - `chunk`: the keys of one product; `step`: those of which the maximum is taken at a time.
    - `factor`: of the scores, in units of log 2.
    - `twice`: whether the queries are a sum of two, already multiplied by `factor`.
    - `factor_in_scores`: whether the scores are multiplied by it.
    """

    dim: int
    width: int
    heads: int
    shared: int
    pair: int
    flat: bool
    queries: int
    keys: int
    rows: int
    columns: int
    chunk: int
    step: int
    factor: float
    twice: bool
    factor_in_scores: bool
    bounded: bool

    @property
    def streams(self) -> bool:
        """Whether there are several blocks of keys."""
        return self.columns < self.keys

    @property
    def spare(self) -> bool:
        """Whether the last pair has one head, beside which there are undefined numbers."""
        return self.heads % self.pair > 0


class _Carry(NamedTuple):
    """What a block of queries knows of the keys so far, for one head."""

    top: Array
    """The highest score, `(1, rows)`; 0 where the scores are bounded."""

    total: Array
    """Sums of weights, one for each row of a register: `(8, rows)`."""

    out: Array
    """The weighted sum of values, `(width, rows)`."""


def program(
    lengths: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    bias_ref: Any,
    segment_refs: Any,
    out_ref: Any,
    *scratch: Any,
    tiling: Tiling,
    hides: bool,
    own_length: bool,
) -> None:
    """Attends from a block of queries to a block of keys, the last axis of the grid."""
    block = pl.program_id(3)
    length = lengths[pl.program_id(0) if own_length else 0]
    start = _Carry(
        jnp.full((1, tiling.rows), 0 if tiling.bounded else _LOWEST, jnp.float32),
        jnp.zeros((8, tiling.rows), jnp.float32),
        jnp.zeros((tiling.width, tiling.rows), jnp.float32),
    )

    def attend_block(carries: list[_Carry]) -> list[_Carry]:
        queries = _split_queries(q_ref[...], tiling)
        for first in range(0, tiling.columns, tiling.chunk):
            keys = slice(first, min(first + tiling.chunk, tiling.columns))
            ends = tiling.keys % tiling.columns
            ragged = 0 < ends < keys.stop
            places = jax.lax.broadcasted_iota(jnp.int32, (keys.stop - first, 1), 0)
            inside = places + (block * tiling.columns + first) < length
            visible = inside if ragged or hides else None
            if segment_refs is not None:
                same = segment_refs[1][keys] == segment_refs[0][...]
                visible = same if visible is None else visible & same
            k, v = k_ref[keys], v_ref[keys]
            if ragged:
                v = jnp.where(inside, v, jnp.zeros_like(v))
            for head, (q, values) in enumerate(zip(queries, _split_values(v, tiling), strict=True)):
                scores = _scores(k, q, head, tiling)
                if bias_ref is not None:
                    shared = min(head, bias_ref.shape[0] - 1)
                    scores = scores + LOG2E * _bias(bias_ref, shared, keys)
                if visible is not None:
                    scores = jnp.where(visible, scores, -jnp.inf)
                for part in range(0, scores.shape[0], tiling.step):
                    these = slice(part, part + tiling.step)
                    weighted = values[these] if tiling.pair == 1 else values[:, these]
                    carries[head] = _absorb(carries[head], scores[these], weighted, tiling)
        return carries

    def finish(carries: list[_Carry]) -> None:
        totals = [jnp.sum(carry.total, axis=0, keepdims=True) for carry in carries]
        parts = [
            carry.out * (1 / jnp.where(total == 0, 1, total))
            for carry, total in zip(carries, totals, strict=True)
        ]
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        out_ref[...] = out.T.astype(out_ref.dtype)

    if not tiling.streams:
        finish(attend_block([start] * tiling.pair))
        return

    def keep(carries: list[_Carry]) -> None:
        for head, carry in enumerate(carries):
            for ref, x in zip(scratch, carry, strict=True):
                ref[head] = x

    kept = lambda: [_Carry(*(ref[head] for ref in scratch)) for head in range(tiling.pair)]
    pl.when(block == 0)(lambda: keep([start] * tiling.pair))
    pl.when(block * tiling.columns < length)(lambda: keep(attend_block(kept())))
    pl.when(block == pl.num_programs(3) - 1)(lambda: finish(kept()))


def _split_queries(q: Array, tiling: Tiling) -> list[Array]:
    """Returns the queries of each head, as wide as the keys of a pair and as `twice` wants them."""
    lane = jax.lax.broadcasted_iota(jnp.int32, q.shape, 1) // tiling.dim
    heads = [q if tiling.pair == 1 else jnp.where(lane == i, q, 0) for i in range(tiling.pair)]
    return [_scaled(each, tiling) for each in heads]


def _scaled(q: Array, tiling: Tiling) -> Array:
    """Multiplies by the factor where that is exact: in float32, by a power of two, or as a sum.

    A matrix unit of 256 rows is half empty at 128 lanes. There its other half takes what rounding
    `factor * q` to half precision leaves over.
    """
    if tiling.factor_in_scores:
        return q
    scaled = q.astype(jnp.float32) * tiling.factor
    if not tiling.twice:
        return scaled.astype(q.dtype)
    high = scaled.astype(q.dtype)
    low = (scaled - high.astype(jnp.float32)).astype(q.dtype)
    return jnp.concatenate([high, low], axis=1)


def _split_values(v: Array, tiling: Tiling) -> list[Array]:
    """Returns the transposed values of each head."""
    if tiling.pair == 1:
        return [v]
    v = v.T
    return [v[i * tiling.width : (i + 1) * tiling.width] for i in range(tiling.pair)]


def _scores(k: Array, q: Array, head: int, tiling: Tiling) -> Float[Array, "keys queries"]:
    """Computes the scores of one head in units of log 2."""
    if tiling.spare:  # undefined numbers times the zeros of `q` are not zero
        lane = jax.lax.broadcasted_iota(jnp.int32, k.shape, 1) // tiling.dim
        k = jnp.where(lane == head, k, jnp.zeros_like(k))
    if tiling.twice:
        k = jnp.concatenate([k, k], axis=1)
    scores = _product(k, q, ((1,), (1,)))
    return scores * tiling.factor if tiling.factor_in_scores else scores


def _bias(ref: Any, head: int, keys: slice) -> Float[Array, "keys #queries"]:
    """Reads the bias of some keys in float32, keys along the rows."""
    if ref.shape[2] == 1:
        return ref[head, keys].astype(jnp.float32)
    return ref[head, :, keys].astype(jnp.float32).T


def _absorb(
    carry: _Carry, scores: Float[Array, "keys queries"], values: Array, tiling: Tiling
) -> _Carry:
    """Adds some keys to the sums."""
    top, total, out = carry
    if not tiling.bounded:
        highest = jnp.max(scores.reshape(-1, 8, tiling.rows), axis=0)
        new = jnp.maximum(top, jnp.max(highest, axis=0, keepdims=True))
        decay = jnp.exp2(top - new)
        top, total, out = new, decay * total, decay * out
        scores = scores - top
    weights = jnp.exp2(scores)
    total = total + jnp.sum(weights.reshape(-1, 8, tiling.rows), axis=0)
    axis = 0 if tiling.pair == 1 else 1
    return _Carry(top, total, out + _product(values, weights.astype(values.dtype), ((axis,), (0,))))


def _product(a: Array, b: Array, axes: tuple[tuple[int], tuple[int]]) -> Array:
    """Multiplies two matrices of one dtype into float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
