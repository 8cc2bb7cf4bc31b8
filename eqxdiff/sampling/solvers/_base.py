import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..._types import PRNGKey
from ..denoiser import Denoise
from ..schedule import Row, Schedule, X


StepIndex = Int[Array, ""] | int

Noise = PRNGKey | Float[Array, "steps draws *shape"]
"""The source of a stochastic solver's noise: a key, or the unit noise of all steps itself."""


class AbstractSolver(eqx.Module):
    """One step along a schedule.

    A solver has no state of its own: `step` takes and returns a PyTree of constant structure.

    - `requires_key`: whether the solver draws noise, so that `key` must be given.
    - `evaluations`: the evaluations of the denoiser in a step, the first included.
    """

    requires_key: eqx.AbstractClassVar[bool]
    evaluations: eqx.AbstractClassVar[int]

    @abc.abstractmethod
    def init(self, x: X, schedule: Schedule) -> PyTree:
        """Returns the state before the first step."""

    @abc.abstractmethod
    def step(
        self,
        denoise: Denoise,
        x: X,
        x0: X,
        state: PyTree,
        schedule: Schedule,
        index: StepIndex,
        key: Noise | None,
    ) -> tuple[X, PyTree]:
        """Goes from row `index` to row `index + 1`.

        **Arguments:**

        - `denoise`: `(x, row) -> x0`, for further evaluations within the step.
        - `x`: the noisy data at row `index`, in float32 or float64.
        - `x0`: the denoised data at row `index`.
        - `state`: the state that the step before, or `init`, returned.
        - `schedule`: the rows.
        - `index`: the number of the step; it may be traced.
        - `key`: the source of noise. Step `index` draws with `jax.random.fold_in(key, index)`.

        **Returns:** the noisy data at row `index + 1` and the next state.
        """


def transfer(x: X, x0: X, row: Row, to: Row) -> X:
    """Goes from `row` to `to` along the trajectory on which x0 is constant.

    This is one step of Euler's method and of DDIM, in every variable that they are written in. All
    other solvers add a correction to it. Neither alpha 0 in `row` nor sigma 0 in `to` is a special
    case.
    """
    ratio = to.sigma / row.sigma
    return ratio * x + (to.alpha - ratio * row.alpha) * x0


def ancestral(x: X, x0: X, row: Row, to: Row, noise: X, eta: Float[Array, ""] | float = 1.0) -> X:
    """Goes from `row` to `to` and renews a part of the noise: with `eta` 1 as much as the
    reverse of the diffusion does, and with 0 none, which is `transfer`.

    Source: https://arxiv.org/abs/2010.02502, equations 12 and 16.
    """
    ratio = to.sigma * row.alpha / (to.alpha * row.sigma)
    renewed = eta * jnp.sqrt(jnp.maximum(1 - ratio**2, 0))
    kept = to.sigma * jnp.sqrt(1 - renewed**2) / row.sigma
    return kept * x + (to.alpha - kept * row.alpha) * x0 + to.sigma * renewed * noise


def log_ratio(row: Row) -> Float[Array, ""]:
    """Returns `log(alpha / sigma)`, half the logarithm of the signal to noise ratio.

    Exponential integrators step in this time. It is minus or plus infinity at the ends, and
    gradients have no NaN there.
    """

    def log(v):
        return jnp.where(v > 0, jnp.log(jnp.where(v > 0, v, 1)), -jnp.inf)

    return log(row.alpha) - log(row.sigma)


def before(schedule: Schedule, index: StepIndex, steps: int = 1) -> Row:
    """Returns the row `steps` steps ago, or the first row."""
    return schedule[jnp.maximum(index - steps, 0)]


def gaussian(key: Noise | None, index: StepIndex, x: X, draw: int = 0) -> X:
    """Returns the unit noise number `draw` of step `index`, of the shape and dtype of `x`.

    The noise is drawn in float32, so that a float64 run sees the same noise.
    """
    if key is None:
        raise ValueError("A stochastic solver needs a key.")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key[index, draw].astype(x.dtype)
    key = jax.random.fold_in(key, index)
    if draw:
        key = jax.random.fold_in(key, draw)
    return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)
