"""Attention on a mesh of devices: the one `shard_map`, within which every backend runs.

Heads are split over `tensor` and tokens over `context`; the batch axes come from the
`spmd_axis_name` of `jax.vmap`. Over `context` there are three forms, chosen by the shapes:

- few keys: each device has some queries and all keys, as in attention to a prompt;
- Ulysses: each device exchanges some tokens of all heads for all tokens of some heads
  (https://arxiv.org/abs/2309.14509);
- ring: keys and values go round while each device attends with its own queries
  (https://arxiv.org/abs/2310.01889).
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from .._dtypes import at_least_float32
from ..sharding import ways


Heads = Float[Array, "queries heads dim"]
KeyHeads = Float[Array, "keys heads dim"]
Bias = Float[Array, "#heads #queries keys"] | None
Mask = Bool[Array, "#heads #queries keys"] | None
Local = Callable[..., Array]
Form = Literal["queries", "ulysses", "ring"]

_MOST_PADDING = 1.25
"""Ulysses computes at most this many times the heads that there are; beyond, the ring is faster."""

_QUERY_BLOCK = 256


def context_form(queries: int, keys: int, heads: int, devices: int) -> Form | None:
    """Chooses how `devices` split the tokens; `None` where they cannot.

    **Arguments:**

    - `heads`: those of one device.
    """
    if devices == 1 or queries % devices:
        return None
    if keys != queries:
        return "queries"
    padded = heads + -heads % devices
    return "ulysses" if padded <= _MOST_PADDING * heads else "ring"


def attend_on_mesh(
    attend: Local, q: Heads, k: KeyHeads, v: KeyHeads, bias: Bias, mask: Mask, scale: float
) -> Heads:
    """Computes attention on the current mesh.

    **Arguments:**

    - `attend`: attention on one device, such as `plain_attention`.
    """
    devices, split = ways("context"), ways("tensor")
    queries, heads, _ = q.shape
    split = 1 if heads == 1 else split
    if more := -heads % split:
        pad = lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0)))
        extra = lambda x: (
            x
            if x is None or x.shape[0] == 1
            else jnp.pad(x, ((0, more), (0, 0), (0, 0)), mode="edge")
        )
        padded = attend_on_mesh(attend, pad(q), pad(k), pad(v), extra(bias), extra(mask), scale)
        return padded[:, :heads]
    form = context_form(queries, k.shape[0], heads // split, devices)
    tensor = "tensor" if split > 1 else None
    tokens = None if form is None else "context"
    keys = tokens if form in ("ulysses", "ring") else None
    rows = tokens if form in ("queries", "ring") else None
    per_score = lambda x: (
        None
        if x is None
        else P(tensor if x.shape[0] > 1 else None, rows if x.shape[1] > 1 else None)
    )
    specs = (P(tokens, tensor), P(keys, tensor), P(keys, tensor), per_score(bias), per_score(mask))

    def local(q, k, v, bias, mask):
        if form == "ulysses":
            return _ulysses(attend, q, k, v, bias, mask, scale)
        if form == "ring":
            return _ring(q, k, v, bias, mask, scale)
        return attend(q, k, v, bias, mask, scale)

    run = jax.shard_map(local, in_specs=specs, out_specs=P(tokens, tensor), check_vma=False)
    return run(q, k, v, bias, mask)


def _ulysses(
    attend: Local, q: Heads, k: KeyHeads, v: KeyHeads, bias: Bias, mask: Mask, scale: float
) -> Heads:
    """Exchanges tokens for heads, attends, and exchanges back. Heads are padded to divide."""
    devices, heads = ways_here(), q.shape[1]
    more = -heads % devices
    own = (heads + more) // devices

    def to_heads(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
        return jax.lax.all_to_all(x, "context", split_axis=1, concat_axis=0, tiled=True)

    def of_heads(x: Array | None) -> Array | None:
        if x is None or x.shape[0] == 1:
            return x
        x = jnp.pad(x, ((0, more), (0, 0), (0, 0)), mode="edge")
        return jax.lax.dynamic_slice_in_dim(x, own * jax.lax.axis_index("context"), own)

    out = attend(to_heads(q), to_heads(k), to_heads(v), of_heads(bias), of_heads(mask), scale)
    out = jax.lax.all_to_all(out, "context", split_axis=0, concat_axis=1, tiled=True)
    return out[:, :heads]


def _ring(q: Heads, k: KeyHeads, v: KeyHeads, bias: Bias, mask: Mask, scale: float) -> Heads:
    """Attends to the keys of one device after the other, which go round meanwhile.

    The loop is unrolled, and each transfer is issued before the products that do not need it, so
    that the compiler can overlap the two.
    """
    devices, me, keys = ways_here(), jax.lax.axis_index("context"), k.shape[0]
    to_next = [(i, (i + 1) % devices) for i in range(devices)]
    out = lse = None
    for turn in range(devices):
        if turn < devices - 1:
            coming = jax.lax.ppermute((k, v), "context", to_next)
        first = keys * ((me - turn) % devices)
        of_keys = lambda x, first=first: (
            None if x is None else (jax.lax.dynamic_slice_in_dim(x, first, keys, axis=2))
        )
        part, part_lse = jax.checkpoint(attend_with_lse, static_argnums=5)(
            q, k, v, of_keys(bias), of_keys(mask), scale
        )
        out, lse = (part, part_lse) if turn == 0 else merge(out, lse, part, part_lse)
        if turn < devices - 1:
            k, v = coming
    return out.astype(q.dtype)


def ways_here() -> int:
    """Returns the size of the axis `context` within the `shard_map`."""
    return jax.lax.axis_size("context")


def merge(
    a: Heads, a_lse: Float[Array, "queries heads"], b: Heads, b_lse: Float[Array, "queries heads"]
) -> tuple[Heads, Float[Array, "queries heads"]]:
    """Merges attention to some keys with attention to others, given the logarithms of the sums of
    both softmaxes (https://arxiv.org/abs/2205.14135, section 3.1)."""
    lse = jnp.logaddexp(a_lse, b_lse)
    share = lambda x_lse: jnp.exp(x_lse - lse)[:, :, None]
    return share(a_lse) * a + share(b_lse) * b, lse


def attend_with_lse(
    q: Heads, k: KeyHeads, v: KeyHeads, bias: Bias, mask: Mask, scale: float
) -> tuple[Heads, Float[Array, "queries heads"]]:
    """Computes attention in at least float32, and the logarithm of each softmax's sum.

    Only the scores of 256 queries exist at a time. A query that sees none of the keys gets zeros
    and the lowest finite logarithm.
    """
    wide, queries = at_least_float32(q.dtype), q.shape[0]
    rows = min(_QUERY_BLOCK, queries)
    lowest = jnp.finfo(wide).min / 2

    @jax.checkpoint
    def block(args: tuple[Array, Bias, Mask]) -> tuple[Array, Array]:
        q, bias, mask = args
        scores = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide) * scale
        if bias is not None:
            scores = scores + bias.astype(wide)
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        top = jnp.maximum(jax.lax.stop_gradient(jnp.max(scores, axis=-1)), lowest)
        weights = jnp.exp(scores - top[:, :, None])
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum("hqk,khd->qhd", weights.astype(v.dtype), v, preferred_element_type=wide)
        some = total > 0
        total = jnp.where(some, total, 1)
        return out / total.T[:, :, None], jnp.where(some, top + jnp.log(total), lowest).T

    def cut(x: Array | None, axis: int) -> Array | None:
        if x is None:
            return None
        if x.shape[axis] == 1:
            return jnp.broadcast_to(x, (-(-queries // rows), *x.shape))
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -queries % rows)
        x = jnp.pad(x, widths, mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1 :]), axis, 0)

    out, lse = jax.lax.map(block, (cut(q, 0), cut(bias, 1), cut(mask, 1)))
    join = lambda x: x.reshape(-1, *x.shape[2:])[:queries]
    return join(out), join(lse)
