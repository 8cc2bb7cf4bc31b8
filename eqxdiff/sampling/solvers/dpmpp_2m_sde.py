from typing import ClassVar

import jax.numpy as jnp

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, ancestral, gaussian
from .dpmpp_2m import extrapolate, second_order


class DPMpp2MSDE(AbstractSolver):
    """DPM-Solver++(2M) for the diffusion's reverse stochastic equation.

    Source: k-diffusion's sample_dpmpp_2m_sde with `solver_type="midpoint"` and `eta` 1; diffusers'
    DPMSolverMultistepScheduler with `algorithm_type="sde-dpmsolver++"`.
    """

    requires_key: ClassVar[bool] = True
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
        return ancestral(x, middle, at, to, gaussian(key, index, x)), x0
