from typing import ClassVar

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, ancestral, gaussian


class DDPM(AbstractSolver):
    """Ancestral sampling: each step draws from the posterior given the denoised data.

    The variance is the smaller one of the paper's two ("fixed_small").

    Source: https://arxiv.org/abs/2006.11239, algorithm 2 and equation 7; diffusers' DDPMScheduler.
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
