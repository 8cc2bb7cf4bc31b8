"""Predictors, guidance, and the denoiser made from them.

A predictor is any callable `(x, row) -> output`, in the network's own parameterization; a denoiser
is any callable `(x, row) -> x0`. Both are usually modules whose fields hold the network and the
conditioning, so that they pass through `jax.jit` as arguments.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._dtypes import at_least_float32
from .._types import Scalar
from .parameterization import AbstractParameterization
from .schedule import Row, X


Predictor = Callable[[X, Row], X]


class Denoiser(eqx.Module):
    """A predictor with the meaning of its output: `(x, row) -> x0`, in the dtype of `x`."""

    predict: Predictor
    parameterization: AbstractParameterization

    def __call__(self, x: X, row: Row) -> X:
        return self.parameterization.denoised(x, self.predict(x, row), row)


class Conditioned(eqx.Module):
    """The predictor of a network given one conditioning.

    **Arguments:**

    - `network`: any callable `(x, row, conditioning) -> output`.
    - `conditioning`: any PyTree.
    """

    network: Callable[[X, Row, PyTree], X]
    conditioning: PyTree

    def __call__(self, x: X, row: Row) -> X:
        return self.network(x, row, self.conditioning)


class ClassifierFree(eqx.Module):
    """The predictor `u + scale * (c - u)` of a network given two conditionings.

    **Arguments:**

    - `network`: any callable `(x, row, conditioning) -> output`.
    - `conditioning`: a PyTree whose arrays have a leading axis of 2, the wanted conditioning first.
        `stack_conditioning` makes it.
    - `scale`: 1 gives the wanted prediction alone; then `Conditioned` does so in half the time.
    - `rescale`: as in `classifier_free`; `None` leaves it out of the program.
    - `sequential`: one call of the network after the other instead of one on both, to save memory.

    Source: https://arxiv.org/abs/2207.12598.
    """

    network: Callable[[X, Row, PyTree], X]
    conditioning: PyTree
    scale: Scalar
    rescale: Scalar | None = None
    sequential: bool = eqx.field(static=True, default=False)

    def __call__(self, x: X, row: Row) -> X:
        arrays, static = eqx.partition(self.conditioning, eqx.is_array)

        def call(arrays):
            return self.network(x, row, eqx.combine(arrays, static))

        both = jax.lax.map(call, arrays) if self.sequential else jax.vmap(call)(arrays)
        return classifier_free(both[0], both[1], self.scale, self.rescale)


def stack_conditioning(conditional: PyTree, unconditional: PyTree) -> PyTree:
    """Two conditionings of one structure in one, for `ClassifierFree`."""
    arrays, static = eqx.partition(conditional, eqx.is_array)
    others = eqx.filter(unconditional, eqx.is_array)
    return eqx.combine(jax.tree.map(lambda a, b: jnp.stack([a, b]), arrays, others), static)


def classifier_free(
    conditional: X, unconditional: X, scale: Scalar, rescale: Scalar | None = None
) -> X:
    """`u + scale * (c - u)` of two outputs for one example, in at least float32.

    **Arguments:**

    - `conditional`, `unconditional`: the network's outputs.
    - `scale`: the guidance scale.
    - `rescale`: how far to go back to the standard deviation, over the whole example, of the
        conditional output: 0 is not at all and 1 all the way.
        Source: https://arxiv.org/abs/2305.08891, section 3.4.
    """
    wide = at_least_float32(conditional.dtype)
    c, u = conditional.astype(wide), unconditional.astype(wide)
    guided = u + scale.astype(wide) * (c - u)
    if rescale is None:
        return guided
    amount = rescale.astype(wide)
    return guided * (amount * (jnp.std(c) / jnp.std(guided)) + (1 - amount))
