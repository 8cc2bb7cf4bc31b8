from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._types import PRNGKey


Block = TypeVar("Block", bound=eqx.Module)
Carry = TypeVar("Carry", bound=PyTree)


def stack(init: Callable[[PRNGKey], Block], depth: int, *, key: PRNGKey) -> Block:
    """`depth` blocks in one module, each array leaf with a leading axis of that length."""
    return eqx.filter_vmap(init)(jax.random.split(key, depth))


def fold(
    blocks: Block, carry: Carry, apply: Callable[[Block, Carry], Carry], *, remat: bool = False
) -> Carry:
    """Applies stacked blocks one after another: `carry = apply(block, carry)` for each, scanned.

    **Arguments:**

    - `blocks`: a module made by `stack`.
    - `carry`: what flows through; its shapes and dtypes stay.
    - `remat`: recompute each block in the backward pass instead of keeping its activations.
    """
    arrays, static = eqx.partition(blocks, eqx.is_array)

    def step(carry, layer):
        return apply(eqx.combine(layer, static), carry), None

    return jax.lax.scan(jax.checkpoint(step) if remat else step, carry, arrays)[0]
