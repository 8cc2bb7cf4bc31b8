from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._dtypes import at_least_float32
from .schedule import Schedule, X
from .solvers._base import AbstractSolver, Denoise, Index, Noise


Remat = Literal["none", "step", "sqrt"]


def start(noise: X, schedule: Schedule) -> X:
    """The noisy data at row 0 from unit noise, in at least float32."""
    wide = noise.astype(at_least_float32(noise.dtype))
    return schedule.start.astype(wide.dtype) * wide


def step(
    denoiser: Denoise,
    x: X,
    state: PyTree,
    schedule: Schedule,
    index: Index,
    solver: AbstractSolver,
    key: Noise | None = None,
) -> tuple[X, PyTree]:
    """One step of `sample`: from row `index` to row `index + 1`.

    A caller that shows progress or previews jits this and calls it once a step, with `index` an
    array: one program serves all steps. The first state is `solver.init(x, schedule)`.

    **Returns:** the noisy data at row `index + 1` and the next state.
    """
    return solver.step(denoiser, x, state, schedule, index, key)


def sample(
    denoiser: Denoise,
    x: X,
    schedule: Schedule,
    solver: AbstractSolver,
    *,
    key: Noise | None = None,
    remat: Remat = "none",
) -> X:
    """Takes `x` from row 0 of the schedule to the last: pure, differentiable, one example.

    Batches, several guidance scales and several conditionings come by `jax.vmap`. Nothing but the
    shapes, the number of steps and the solver is compiled in.

    **Arguments:**

    - `denoiser`: `(x, row) -> x0`, such as a `Denoiser`.
    - `x`: the noisy data at row 0: `start(noise, schedule)`. It is widened to float32 at least.
    - `schedule`: the noise levels.
    - `solver`: how to step from one to the next.
    - `key`: for solvers that draw noise: a key, or all their unit noise, `(steps, draws, *shape)`.
    - `remat`: what the backward pass keeps: everything; `"step"`: x at every step, recomputing each
        step once; `"sqrt"`: x at every about sqrt(steps) steps, recomputing each step twice.

    **Returns:** `x` at the last row, in float32 or float64.

    **Raises:** `ValueError` for a stochastic solver without a key.
    """
    if solver.requires_key and key is None:
        raise ValueError(f"{type(solver).__name__} draws noise and needs a key.")
    x = x.astype(at_least_float32(x.dtype))

    def body(carry, index):
        x, state = carry
        return step(denoiser, x, state, schedule, index, solver, key), None

    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False)
    carry = (x, solver.init(x, schedule))
    indices = jnp.arange(schedule.steps)
    if remat == "sqrt":
        run = max(1, round(schedule.steps**0.5))
        whole = schedule.steps - schedule.steps % run

        def outer(carry, indices):
            return jax.lax.scan(body, carry, indices)[0], None

        outer = jax.checkpoint(outer, prevent_cse=False)
        carry = jax.lax.scan(outer, carry, indices[:whole].reshape(-1, run))[0]
        indices = indices[whole:]
    return jax.lax.scan(body, carry, indices)[0][0]
