from typing import ClassVar

import jax.numpy as jnp

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, gaussian, transfer


class TCD(AbstractSolver):
    """Trajectory consistency sampling: to the row within the step, then noise up to the next.

    It is for models distilled to be consistent along the trajectory. The schedule holds the
    stochasticity gamma: the lower the rows within the steps are, the more noise is new.

    Source: https://arxiv.org/abs/2402.19159, algorithm 4; diffusers' TCDScheduler, whose `eta` is
    gamma.
    """

    requires_key: ClassVar[bool] = True
    evaluations: ClassVar[int] = 1

    def init(self, x: X, schedule: Schedule) -> None:
        return None

    def step(
        self,
        denoise: Denoise,
        x: X,
        x0: X,
        state: None,
        schedule: Schedule,
        index: StepIndex,
        key: Noise | None,
    ) -> tuple[X, None]:
        at, to = schedule[index].astype(x.dtype), schedule[index + 1].astype(x.dtype)
        within = schedule.within(index).astype(x.dtype)
        ratio = to.alpha / within.alpha
        new = jnp.sqrt(jnp.maximum(1 - ratio**2, 0))
        return ratio * transfer(x, x0, at, within) + new * gaussian(key, index, x), None
