from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._types import PRNGKey


Block = TypeVar("Block", bound=eqx.Module)
Carry = TypeVar("Carry", bound=PyTree)
Keep = Callable[[PyTree], PyTree]
"""Chooses or computes what to keep of a block's output."""


def nothing(output: PyTree) -> None:
    """Keeps nothing of a block's output."""


def everything(output: PyTree) -> PyTree:
    """Keeps a block's output as it is."""
    return output


def stack(init: Callable[[PRNGKey], Block], depth: int, *, key: PRNGKey) -> Block:
    """Makes `depth` blocks in one module, each array leaf with a leading axis of that length."""
    return eqx.filter_vmap(init)(jax.random.split(key, depth))


def fold(
    blocks: Block,
    carry: Carry,
    apply: Callable[[Block, Carry], Carry],
    *,
    remat: bool = False,
    keep: Keep = nothing,
) -> tuple[Carry, PyTree]:
    """Applies stacked blocks one after another: `carry = apply(block, carry)` for each, scanned.

    Returns the last carry, and `keep(carry)` after each block, stacked along a leading axis.

    **Arguments:**

    - `blocks`: a module made by `stack`.
    - `carry`: the arrays that flow through the blocks; their shapes and dtypes stay.
    - `remat`: recompute each block in the backward pass instead of keeping its activations.
    - `keep`: what to return of each block's output. `nothing` by default, `everything`, or any
        function, which saves memory: `lambda x: x.mean(axis=0)`.
    """
    arrays, static = eqx.partition(blocks, eqx.is_array)

    def step(carry, layer):
        carry = apply(eqx.combine(layer, static), carry)
        return carry, keep(carry)

    return jax.lax.scan(jax.checkpoint(step) if remat else step, carry, arrays)


def each(blocks: Block, apply: Callable[[Block], PyTree]) -> PyTree:
    """Returns `apply(block)` of stacked blocks, stacked along a leading axis.

    The blocks are computed one after the other, as in `fold`: of weights that are spread over
    devices, only one block's are gathered at a time.
    """
    arrays, static = eqx.partition(blocks, eqx.is_array)
    return jax.lax.map(lambda layer: apply(eqx.combine(layer, static)), arrays)
