from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, before, log_ratio, transfer


class DPMpp2M(AbstractSolver):
    """DPM-Solver++(2M): a two-step exponential integrator of the denoised data.

    The last step is of first order where it ends at no noise, or where there are fewer than 15
    steps. The state is the denoised data of the step before.

    Source: https://arxiv.org/abs/2211.01095, algorithm 2; diffusers' DPMSolverMultistepScheduler of
    order 2 with `algorithm_type="dpmsolver++"`, `solver_type="midpoint"`.
    """

    requires_key: ClassVar[bool] = False
    evaluations: ClassVar[int] = 1

    def init(self, x: X, schedule: Schedule) -> X:
        return jnp.zeros_like(x)

    def step(
        self,
        denoise: Denoise,
        x: X,
        x0: X,
        state: X,
        schedule: Schedule,
        index: StepIndex,
        key: Noise | None,
    ) -> tuple[X, X]:
        at, to = schedule[index].astype(x.dtype), schedule[index + 1].astype(x.dtype)
        middle = extrapolate(x0, state, schedule, index, second_order(schedule, index))
        return transfer(x, middle, at, to), x0


def second_order(schedule: Schedule, index: StepIndex) -> Bool[Array, ""] | bool:
    """Returns whether a step uses the step before. The first step does not, nor does the last where
    it ends at no noise or there are fewer than 15."""
    last = index == schedule.steps - 1
    return (index > 0) & ~(last & ((schedule[-1].sigma == 0) | (schedule.steps < 15)))


def extrapolate(
    x0: X, past_x0: X, schedule: Schedule, index: StepIndex, second: Bool[Array, ""] | bool
) -> X:
    """Returns the denoised data half way through a step, on the line through the denoised data of
    this step and of the step before."""
    rows = before(schedule, index), schedule[index], schedule[index + 1]
    past, now, to = (log_ratio(row.astype(x0.dtype)) for row in rows)
    weight = jnp.where(second, to - now, 0) / jnp.where(second, now - past, 1) / 2
    return x0 + weight * (x0 - past_x0)
