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
from jaxtyping import Array, Float, Int

from .._dtypes import at_least_float32
from ..sharding import ways
from ._choice import Segments


HIDDEN = -1e30
"""The bias of a key that a query may not see: its weight is exactly zero beside any other."""

Heads = Float[Array, "queries heads dim"]
KeyHeads = Float[Array, "keys key_heads dim"]
Values = Float[Array, "keys key_heads value_dim"]
Out = Float[Array, "queries heads value_dim"]
Sums = Float[Array, "queries heads"]
Bias = Float[Array, "#heads #queries keys"] | None
Length = Int[Array, ""] | None
Local = Callable[..., Out]

_MOST_PADDING = 1.25
"""Ulysses computes at most this many times the heads that there are; beyond, the ring is faster."""

_QUERY_BLOCK = 256


def context_form(
    queries: int, keys: int, heads: int, devices: int
) -> Literal["queries", "ulysses", "ring"] | None:
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
    attend: Local,
    q: Heads,
    k: KeyHeads,
    v: Values,
    bias: Bias,
    key_length: Length,
    segments: Segments | None,
    *,
    scale: float,
) -> Out:
    """Computes attention on the current mesh; see `attention`.

    **Arguments:**

    - `attend`: attention on one device: `(q, k, v, bias, key_length, segments)`.
    """
    devices, heads = ways("context"), q.shape[1]
    split = 1 if heads == 1 else ways("tensor")
    if heads != k.shape[1] and k.shape[1] % (split * devices):
        k, v = (jnp.repeat(x, heads // k.shape[1], axis=1) for x in (k, v))
    if more := -heads % split:
        q, k, v = (_more_heads(x, more, axis=1) for x in (q, k, v))
        bias = None if bias is None else _more_heads(bias, more, axis=0)
        out = attend_on_mesh(attend, q, k, v, bias, key_length, segments, scale=scale)
        return out[:, :heads]
    form = context_form(q.shape[0], k.shape[0], heads // split, devices)
    tensor = "tensor" if split > 1 else None
    tokens = None if form is None else "context"
    rows = tokens if form in ("queries", "ring") else None
    own, keys = P(tokens, tensor), P(tokens if form in ("ulysses", "ring") else None, tensor)
    scores = None
    if bias is not None:
        scores = P(tensor if bias.shape[0] > 1 else None, rows if bias.shape[1] > 1 else None)
    some = None if segments is None else (P(rows), P())
    specs = (own, keys, keys, scores, None if key_length is None else P(), some)

    def local(q, k, v, bias, key_length, segments):
        if form == "ulysses":
            return _ulysses(attend, q, k, v, bias, key_length, segments)
        if form == "ring":
            return _ring(q, k, v, bias, key_length, segments, scale)
        return attend(q, k, v, bias, key_length, segments)

    run = jax.shard_map(local, in_specs=specs, out_specs=own, check_vma=False)
    return run(q, k, v, bias, key_length, segments)


def _more_heads(x: Array, more: int, axis: int) -> Array:
    """Repeats the last head `more` times; a bias of one head serves all."""
    if x.shape[axis] == 1:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return jnp.pad(x, widths, mode="edge")


def _ulysses(
    attend: Local,
    q: Heads,
    k: KeyHeads,
    v: Values,
    bias: Array | None,
    key_length: Length,
    segments: Segments | None,
) -> Out:
    """Exchanges tokens for heads, attends, and exchanges back. Heads are padded to divide."""
    devices, heads = jax.lax.axis_size("context"), q.shape[1]
    more = -heads % devices

    def to_heads(x: Array) -> Array:
        x = _more_heads(x, -x.shape[1] % devices, axis=1)
        return jax.lax.all_to_all(x, "context", split_axis=1, concat_axis=0, tiled=True)

    if bias is not None and bias.shape[0] > 1:
        own = (heads + more) // devices
        first = own * jax.lax.axis_index("context")
        bias = jax.lax.dynamic_slice_in_dim(_more_heads(bias, more, axis=0), first, own)
    out = attend(*map(to_heads, (q, k, v)), bias, key_length, segments)
    out = jax.lax.all_to_all(out, "context", split_axis=0, concat_axis=1, tiled=True)
    return out[:, :heads]


def _ring(
    q: Heads,
    k: KeyHeads,
    v: Values,
    bias: Array | None,
    key_length: Length,
    segments: tuple[Array, Array] | None,
    scale: float,
) -> Out:
    """Attends to the keys of one device after the other, which go round meanwhile.

    The loop is unrolled, and each transfer is issued before the products that do not need it, so
    that the compiler can overlap the two.
    """
    devices, me = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    keys, dtype = k.shape[0], q.dtype
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    to_next = [(i, (i + 1) % devices) for i in range(devices)]
    turn = jax.checkpoint(attend_with_lse, static_argnums=4)

    def seen(first: Array) -> Array | None:
        """Returns the bias of the keys from `first` on."""
        own = None
        if bias is not None:
            own = jax.lax.dynamic_slice_in_dim(bias, first, keys, axis=2).astype(jnp.float32)
        if key_length is not None:
            own = _hide(own, (first + jnp.arange(keys) < key_length)[None, None])
        if segments is not None:
            other = jax.lax.dynamic_slice_in_dim(segments[1], first, keys)
            own = _hide(own, (segments[0][:, None] == other)[None])
        return own

    def attend(number: int, k: Array, v: Array) -> tuple[Array, Array]:
        return turn(q, k, v, seen(keys * ((me - number) % devices)), scale)

    coming = jax.lax.ppermute((k, v), "context", to_next)
    out, lse = attend(0, k, v)
    for number in range(1, devices):
        k, v = coming
        if number < devices - 1:
            coming = jax.lax.ppermute((k, v), "context", to_next)
        out, lse = merge(out, lse, *attend(number, k, v))
    return out.astype(dtype)


def _hide(bias: Array | None, visible: Array) -> Array:
    return jnp.where(visible, 0.0 if bias is None else bias, HIDDEN)


def merge(a: Out, a_lse: Sums, b: Out, b_lse: Sums) -> tuple[Out, Sums]:
    """Merges attention to some keys with attention to others, given the logarithms of the sums of
    both softmaxes (https://arxiv.org/abs/2205.14135, section 3.1)."""
    lse = jnp.logaddexp(a_lse, b_lse)
    share = lambda own: jnp.exp(own - lse)[:, :, None]
    return share(a_lse) * a + share(b_lse) * b, lse


def attend_with_lse(
    q: Heads,
    k: Float[Array, "keys heads dim"],
    v: Float[Array, "keys heads value_dim"],
    bias: Bias,
    scale: float,
) -> tuple[Out, Sums]:
    """Computes attention in at least float32, and the logarithm of each softmax's sum.

    Only the scores of 256 queries exist at a time.
    """
    wide, queries = at_least_float32(q.dtype), q.shape[0]
    rows = min(_QUERY_BLOCK, queries)

    @jax.checkpoint
    def block(args: tuple[Array, Array | None]) -> tuple[Array, Array]:
        q, bias = args
        scores = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide) * scale
        scores = scores if bias is None else scores + bias.astype(wide)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - top[:, :, None])
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum("hqk,khd->qhd", weights.astype(v.dtype), v, preferred_element_type=wide)
        return out / total.T[:, :, None], (top + jnp.log(total)).T

    def cut(x: Array | None, axis: int) -> Array | None:
        """Cuts queries into blocks, along a new first axis."""
        if x is None:
            return None
        if x.shape[axis] == 1:
            return jnp.broadcast_to(x, (-(-queries // rows), *x.shape))
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -queries % rows)
        x = jnp.pad(x, widths, mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1 :]), axis, 0)

    out, lse = jax.lax.map(block, (cut(q, 0), cut(bias, 1)))
    join = lambda x: x.reshape(-1, *x.shape[2:])[:queries]
    return join(out), join(lse)
