from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, transfer


class Heun(AbstractSolver):
    """Heun's method: an Euler step, then the mean of the slopes at both ends.

    The slope is that of `x / alpha` in `sigma / alpha`, or with `straight` of `x / (alpha + sigma)`
    in `sigma / (alpha + sigma)`, which is the variable for flows. A step that ends at sigma 0 is an
    Euler step. A step from alpha 0 is one, too, unless the variable is straight.

    Source: https://arxiv.org/abs/2206.00364, algorithm 1; diffusers' HeunDiscreteScheduler and
    FlowMatchHeunDiscreteScheduler.
    """

    straight: bool = eqx.field(static=True, default=False)

    requires_key: ClassVar[bool] = False
    evaluations: ClassVar[int] = 2

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

        def scale(row):
            return row.alpha + row.sigma if self.straight else row.alpha

        euler = transfer(x, x0, at, to)
        corrected = (to.sigma > 0) & (scale(at) > 0)

        def slope(x, x0, row):
            eps = (x - row.alpha * x0) / jnp.where(corrected, row.sigma, 1)
            return eps - x0 if self.straight else eps

        def correct():
            difference = slope(euler, denoise(euler, schedule[index + 1]), to) - slope(x, x0, at)
            ratio = scale(to) / jnp.where(corrected, scale(at), 1)
            return euler + (to.sigma - at.sigma * ratio) / 2 * difference

        return jax.lax.cond(corrected, correct, lambda: euler), None
