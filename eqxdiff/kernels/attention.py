"""Attention: the one interface of all its backends."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..sharding import current_mesh
from . import (
    _attention_chunked,
    _attention_cudnn,
    _attention_pallas_gpu,
    _attention_pallas_tpu,
    _attention_xla,
)
from ._batching import any_batch
from ._choice import AttentionChoice, Backend, Segments, attention_choice
from ._mesh import HIDDEN, attend_on_mesh


_BACKENDS = {
    "chunked": _attention_chunked,
    "pallas_tpu": _attention_pallas_tpu,
    "cudnn": _attention_cudnn,
    "pallas_gpu": _attention_pallas_gpu,
}


def attention(
    q: Float[Array, "queries heads dim"],
    k: Float[Array, "keys key_heads dim"],
    v: Float[Array, "keys key_heads value_dim"],
    *,
    bias: Float[Array, "#heads #queries keys"] | None = None,
    mask: Bool[Array, "#heads #queries keys"] | None = None,
    key_length: Int[Array, ""] | None = None,
    segments: Segments | None = None,
    scale: float | None = None,
    bounded: bool = False,
    implementation: Backend | None = None,
) -> Float[Array, "queries heads value_dim"]:
    """Computes the attention of one example: `softmax(scale q k^T + bias) v` for each head.

    Scores and softmax are in at least float32; the result has the dtype of `q`. The batch comes by
    `jax.vmap`, of which the backends see one leading axis. Which backend computes it, in which
    blocks and over which devices, says the `AttentionChoice` that `attending` has put in place.

    **Arguments:**

    - `q`, `k`, `v`: any number of queries and of keys, in one dtype. Each head of `k` and `v`
        serves `heads / key_heads` heads of `q` (https://arxiv.org/abs/2305.13245).
    - `bias`: what to add to the scaled scores.
    - `mask`: `True` where a query may look. At least one key of every query must be visible.
    - `key_length`: only so many of the first keys are visible, at least one.
    - `segments`: numbers of the queries and of the keys, where a query sees the keys of its number.
    - `scale`: `dim ** -0.5` by default.
    - `bounded`: whether no scaled score is beyond 64 on either side, so that a kernel may leave out
        the maximum.
    - `implementation`: this backend and no other, in place of the choice.

    **Raises:** `NotImplementedError` where the backend that `implementation` names cannot do this,
    with the reason.

    Source: https://arxiv.org/abs/1706.03762, section 3.2.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads cannot share {k.shape[1]} heads of keys.")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if mask is not None:
        bias = jnp.where(mask, 0.0 if bias is None else bias.astype(jnp.float32), HIDDEN)
    attend = functools.partial(_attend, implementation, scale, bounded)
    if current_mesh() is not None:
        attend = functools.partial(attend_on_mesh, attend, scale=scale)
    return attend(q, k, v, bias, key_length, segments)


def _attend(
    implementation: Backend | None,
    scale: float,
    bounded: bool,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    key_length: Array | None,
    segments: tuple[Array, Array] | None,
) -> Array:
    """Computes attention on one device by the first backend that can."""
    choice = attention_choice()
    names = choice.order(q, k) if implementation is None else (implementation,)
    for name in names:
        try:
            call = _call(name, choice, scale, bounded, biased=bias is not None)
            out = call(q, k, v, bias, key_length, segments)
        except NotImplementedError:
            if name == names[-1]:
                raise
            continue
        if implementation is None:
            choice.note(q, k, name)
        return out
    raise AssertionError


def _call(
    name: str, choice: AttentionChoice, scale: float, bounded: bool, *, biased: bool
) -> Callable[..., Float[Array, "queries heads value_dim"]]:
    """Returns the attention of one example by a backend, under any vmaps and with gradients."""
    blocks = choice.blocks
    if name == "xla":
        return functools.partial(_attention_xla.attend, scale=scale)
    natural = functools.partial(_attention_chunked.attend_one, scale=scale, blocks=blocks)
    if name == "chunked" and choice.unknown_devices:
        return natural
    backend = _BACKENDS[name]
    batched = functools.partial(
        backend.attend,
        scale=scale,
        blocks=blocks,
        bounded=bounded,
        device=choice.device,
        interpret=choice.interpret,
    )

    def forward(*arrays: Any) -> Array:
        leading = jax.tree.map(lambda x: x[None], arrays)
        return any_batch(batched)(*leading)[0]

    if backend.DIFFERENTIABLE and not biased:
        return _with_own_gradient(forward, batched)
    return _with_gradient_of(natural, forward)


def _with_gradient_of(natural: Callable[..., Array], forward: Callable[..., Array]) -> Any:
    """Returns `forward` with the derivatives of `natural`, forwards and backwards."""
    attend = jax.custom_jvp(forward)

    @attend.defjvp
    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        # The value of `natural` is dead code in a gradient, of which it keeps nothing.
        return attend(*primals), jax.jvp(natural, primals, tangents)[1]

    return attend


def _with_own_gradient(forward: Callable[..., Array], batched: Callable[..., Array]) -> Any:
    """Returns `forward` with the gradient of the backend, which keeps q, k, v and no scores."""
    attend = jax.custom_vjp(forward)

    def backward(arrays: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
        q, k, v, bias, *rest = arrays

        def pull(q: Array, k: Array, v: Array, bias: Any, *rest: Any) -> tuple[Any, ...]:
            *others, cotangent = rest
            differentiable = lambda *given: batched(*given, *others)
            return jax.vjp(differentiable, q, k, v, bias)[1](cotangent)

        leading = jax.tree.map(lambda x: x[None], (q, k, v, bias, *rest, cotangent))
        grads = any_batch(pull, whole=True)(*leading)
        return (*jax.tree.map(lambda x: x[0], grads), *(None for _ in rest))

    attend.defvjp(lambda *arrays: (attend(*arrays), arrays), backward)
    return attend
