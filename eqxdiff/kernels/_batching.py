"""One leading batch axis for functions that take batched arrays, under any number of vmaps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def any_batch(function: Callable[..., PyTree], *, whole: bool = False) -> Callable[..., PyTree]:
    """Returns a function that `jax.vmap` calls once, with its axis joined to the leading axis.

    **Arguments:**

    - `function`: takes and returns arrays with one leading batch axis, which is 1 for an argument
        that is the same for all examples.
    - `whole`: whether all arguments have the whole axis: a result that belongs to an argument, such
        as its gradient, belongs to that of each example.
    """

    @jax.custom_batching.custom_vmap
    def call(*args: PyTree) -> PyTree:
        return function(*args)

    @call.def_vmap
    def rule(size: int, batched: Any, *args: PyTree) -> tuple[PyTree, PyTree]:
        inner = jax.tree.map(lambda x, own: x.shape[1 if own else 0], args, tuple(batched))
        most = max(jax.tree.leaves(inner))

        def fold(index: int, x: Array, own: bool) -> Array:
            if not own and x.shape[0] == 1 and index > 2 and not whole:
                return x
            x = x if own else x[None]
            x = jnp.broadcast_to(x, (size, most, *x.shape[2:]))
            return x.reshape(size * most, *x.shape[2:])

        folded = [
            jax.tree.map(lambda x, own, index=index: fold(index, x, own), arg, own)
            for index, (arg, own) in enumerate(zip(args, batched, strict=True))
        ]
        out = call(*folded)
        out = jax.tree.map(lambda x: x.reshape(size, most, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call
