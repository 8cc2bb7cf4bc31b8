from typing import ClassVar

import jax
import jax.numpy as jnp

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, ancestral, gaussian, transfer


class DPMppSDE(AbstractSolver):
    """DPM-Solver++(S) for the stochastic equation: each step denoises again at its middle.

    The noises of half a step and of the whole step belong to one Brownian path in sigma / alpha,
    which is drawn as two independent halves. A step to no noise is Euler's.

    Source: k-diffusion's sample_dpmpp_sde; diffusers' DPMSolverSDEScheduler.
    """

    requires_key: ClassVar[bool] = True
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
        half = schedule.within(index).astype(x.dtype)

        def noisy():
            noises = gaussian(key, index, x, 0), gaussian(key, index, x, 1)
            x_half = ancestral(x, x0, at, half, noises[0])
            x0_half = denoise(x_half, schedule.within(index))
            s, s_half, s_to = (row.sigma / row.alpha for row in (at, half, to))
            share = (s - s_half) / (s - s_to)
            path = jnp.sqrt(share) * noises[0] + jnp.sqrt(1 - share) * noises[1]
            return ancestral(x, x0_half, at, to, path)

        return jax.lax.cond(to.sigma > 0, noisy, lambda: transfer(x, x0, at, to)), None
