from typing import ClassVar

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, ancestral, gaussian


class EulerAncestral(AbstractSolver):
    """Euler's method to less noise than the next row has, then new noise up to the next row.

    On preserving rows this is the posterior of DDPM. The two samplers differ only in the levels of
    their schedules.

    Source: k-diffusion's sample_euler_ancestral; diffusers' EulerAncestralDiscreteScheduler.
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
        return ancestral(x, x0, at, to, gaussian(key, index, x)), None
