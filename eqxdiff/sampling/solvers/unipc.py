from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, before, log_ratio, transfer
from .dpmpp_2m import extrapolate


class UniPC(AbstractSolver):
    """UniPC-2: DPM-Solver++(2M), with each step corrected by the evaluation of the next step.

    The correction needs no evaluation of its own. The state is x before the last step, x
    after it, and the denoised data of the last two steps.

    A change that a hook makes to x between steps is kept. diffusers corrects from the x before the
    step and so loses it.

    Source: https://arxiv.org/abs/2302.04867, algorithms 5 and 7 with B(h) of the second kind;
    diffusers' UniPCMultistepScheduler of order 2 with `solver_type="bh2"`.
    """

    requires_key: ClassVar[bool] = False
    evaluations: ClassVar[int] = 1

    def init(self, x: X, schedule: Schedule) -> tuple[X, X, X, X]:
        return x, x, jnp.zeros_like(x), jnp.zeros_like(x)

    def step(
        self,
        denoise: Denoise,
        x: X,
        x0: X,
        state: tuple[X, X, X, X],
        schedule: Schedule,
        index: StepIndex,
        key: Noise | None,
    ) -> tuple[X, tuple[X, X, X, X]]:
        past_x, predicted, past_x0, older_x0 = state
        at, to = schedule[index].astype(x.dtype), schedule[index + 1].astype(x.dtype)
        past, older = (before(schedule, index, k).astype(x.dtype) for k in (1, 2))

        # Correct the step that led here.
        second = index > 1
        h = jnp.where(index > 0, log_ratio(at) - log_ratio(past), 1)
        growth = jnp.where(second, h, 0) / jnp.where(second, log_ratio(past) - log_ratio(older), 1)
        mean, square = _moments(h)
        curve = (mean - square) * growth / (growth + 1)
        slope = jnp.where(second, mean - curve, 0.5)
        bend = curve * growth * (past_x0 - older_x0)
        corrected = transfer(past_x, past_x0 + bend + slope * (x0 - past_x0), past, at)
        x = jnp.where(index > 0, corrected + (x - predicted), x)

        # Predict the next.
        second = (index > 0) & (index < schedule.steps - 1)
        middle = extrapolate(x0, past_x0, schedule, index, second)
        predicted = transfer(x, middle, at, to)
        return predicted, (x, predicted, x0, past_x0)


def _moments(h: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the means of u and of u**2 for the density proportional to `exp(h u)` on [0, 1].

    For small h, where the closed form loses its digits, it uses the series of the cumulants.
    """
    small = h < 0.5
    near, far = jnp.where(small, h, 0), jnp.where(small, 1, h)
    mean = 1 / 2 + near / 12 - near**3 / 720 + near**5 / 30240 - near**7 / 1209600
    variance = 1 / 12 - near**2 / 240 + near**4 / 6048 - near**6 / 172800
    total = 1 / -jnp.expm1(-far)
    far_mean = total - 1 / far
    return (
        jnp.where(small, mean, far_mean),
        jnp.where(small, variance + mean**2, total - 2 * far_mean / far),
    )
