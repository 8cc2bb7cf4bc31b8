import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..._types import PRNGKey
from ..schedule import Row, Schedule, X


Denoise = Callable[[X, Row], X]
Index = Int[Array, ""] | int

Noise = PRNGKey | Float[Array, "steps draws *shape"]
"""Where a stochastic solver takes its noise from: a key, or the unit noise of all steps itself."""


class AbstractSolver(eqx.Module):
    """One step along a schedule.

    A solver is stateless: what it remembers between steps is a PyTree of constant structure.

    - `requires_key`: the solver draws noise, and `key` must be given.
    - `evaluations`: calls of the network a step.
    """

    requires_key: eqx.AbstractClassVar[bool]
    evaluations: eqx.AbstractClassVar[int]

    @abc.abstractmethod
    def init(self, x: X, schedule: Schedule) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def step(
        self,
        denoise: Denoise,
        x: X,
        state: PyTree,
        schedule: Schedule,
        index: Index,
        key: Noise | None,
    ) -> tuple[X, PyTree]:
        """From row `index` to row `index + 1`.

        **Arguments:**

        - `denoise`: `(x, row) -> x0`.
        - `x`: the noisy data at row `index`, in float32 or float64.
        - `state`: what the step before, or `init`, returned.
        - `schedule`: the rows.
        - `index`: which step; it may be traced.
        - `key`: where noise comes from. Step `index` draws with `jax.random.fold_in(key, index)`.

        **Returns:** the noisy data at row `index + 1` and the next state.
        """


def transfer(x: X, x0: X, row: Row, to: Row) -> X:
    """From `row` to `to` along the trajectory on which x0 is constant.

    That is one step of Euler's method and of DDIM in any of the variables that they are written in,
    and every other solver is this and a correction. Neither alpha 0 in `row` nor sigma 0 in
    `to` is a special case.
    """
    ratio = to.sigma / row.sigma
    return ratio * x + (to.alpha - ratio * row.alpha) * x0


def gaussian(key: Noise | None, index: Index, x: X, draw: int = 0) -> X:
    """The unit noise number `draw` of step `index`, of the shape and dtype of `x`.

    It is drawn in float32, so that a float64 run sees the same noise.
    """
    if key is None:
        raise ValueError("A stochastic solver needs a key.")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key[index, draw].astype(x.dtype)
    key = jax.random.fold_in(key, index)
    if draw:
        key = jax.random.fold_in(key, draw)
    return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)
