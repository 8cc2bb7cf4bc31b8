from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._dtypes import at_least_float32
from .denoiser import AbstractDenoiser, Denoise, GuidedDenoiser, as_denoiser
from .hooks import Hook, Moment, hooked
from .schedule import Row, Schedule, X
from .solvers import AbstractSolver
from .solvers._base import Noise, StepIndex


Remat = Literal["none", "step", "sqrt"]


def start(noise: X, schedule: Schedule) -> X:
    """Returns the noisy data at row 0 from unit noise, in at least float32."""
    wide = noise.astype(at_least_float32(noise.dtype))
    return schedule.start.astype(wide.dtype) * wide


class State(eqx.Module):
    """What one step hands to the next, besides x.

    **Fields:**

    - `solver`: the solver's state.
    - `memory`: the denoiser's memory.
    """

    solver: PyTree
    memory: PyTree


def begin(
    denoiser: AbstractDenoiser | Denoise, x: X, schedule: Schedule, solver: AbstractSolver
) -> State:
    """Returns the state before the first step, for `x` as `start` returned it."""
    return State(solver.init(x, schedule), as_denoiser(denoiser).init(x))


def step(
    denoiser: AbstractDenoiser | Denoise,
    x: X,
    state: State,
    schedule: Schedule,
    index: StepIndex,
    solver: AbstractSolver,
    key: Noise | None = None,
    hooks: Sequence[Hook] = (),
) -> tuple[X, X, State]:
    """Takes one step of `sample`: from row `index` to row `index + 1`.

    A caller that shows progress or previews jits this function and calls it once a step, with
    `index` an array: one program serves all steps. The first state is from `begin`.

    The evaluation at row `index` updates the denoiser's memory. Where the solver evaluates more
    often, the further evaluations read the updated memory and change nothing in it.

    **Returns:** the noisy data at row `index + 1`, the clean data that the step started with, and
    the next state.
    """
    denoiser = as_denoiser(denoiser)
    row = schedule[index]

    def reading(memory: PyTree) -> Denoise:
        return lambda x, row: denoiser.recall(x, row, memory)[0]

    x0, memory = denoiser.recall(x, row, state.memory)
    x0 = hooked(hooks, reading(state.memory), x0, x, row)
    further = reading(memory)

    def denoise(x: X, row: Row) -> X:
        return hooked(hooks, further, further(x, row), x, row)

    x, solved = solver.step(denoise, x, x0, state.solver, schedule, index, key)
    last = jnp.asarray(index == schedule.steps - 1)
    moment = Moment(jnp.asarray(index), row, schedule[index + 1], last)
    for hook in hooks:
        if hook.on_x is not None:
            x = hook.on_x(x, x0, moment)
    return x, x0, State(solved, memory)


def on_rows(hooks: Sequence[Hook]) -> bool:
    """Whether the denoiser is asked for rows of the schedule alone. An `on_x0` may ask for any."""
    return all(hook.on_x0 is None for hook in hooks)


def sample(
    denoiser: AbstractDenoiser | Denoise,
    x: X,
    schedule: Schedule,
    solver: AbstractSolver,
    *,
    key: Noise | None = None,
    hooks: Sequence[Hook] = (),
    remat: Remat = "none",
) -> X:
    """Takes `x` from row 0 of the schedule to the last: pure, differentiable, one example.

    Batches, and several guidance scales, conditions, schedules or hooks, come by `jax.vmap`. Only
    the shapes, the number of steps, the solver and the code of the hooks are compiled in.

    **Arguments:**

    - `denoiser`: such as a `GuidedDenoiser`, or any callable `(x, row) -> x0`.
    - `x`: the noisy data at row 0: `start(noise, schedule)`. It is widened to float32 at least.
    - `schedule`: the noise levels.
    - `solver`: how to step from one to the next.
    - `key`: for solvers that draw noise: a key, or all their unit noise, `(steps, draws, *shape)`.
    - `hooks`: change x0 or x in every step, one after the other.
    - `remat`: what the backward pass keeps: everything; `"step"`: x at every step, recomputing each
        step once; `"sqrt"`: x at every about sqrt(steps) steps, recomputing each step twice.

    **Returns:** `x` at the last row, in float32 or float64.

    **Raises:** `ValueError` for a stochastic solver without a key.
    """
    if solver.requires_key and key is None:
        raise ValueError(f"{type(solver).__name__} draws noise and needs a key.")
    x = x.astype(at_least_float32(x.dtype))
    if isinstance(denoiser, GuidedDenoiser) and on_rows(hooks):
        denoiser = denoiser.ahead(x, schedule)
    state = begin(denoiser, x, schedule, solver)
    return finish(denoiser, x, state, schedule, solver, key, hooks, remat)


def finish(
    denoiser: AbstractDenoiser | Denoise,
    x: X,
    state: State,
    schedule: Schedule,
    solver: AbstractSolver,
    key: Noise | None = None,
    hooks: Sequence[Hook] = (),
    remat: Remat = "none",
) -> X:
    """Takes all steps from the state that `begin` returned, and returns `x` at the last row.

    **Arguments:** as of `sample`.
    """

    def body(carry, index):
        x, state = carry
        x, _, state = step(denoiser, x, state, schedule, index, solver, key, hooks)
        return (x, state), None

    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False)
    carry = (x, state)
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
