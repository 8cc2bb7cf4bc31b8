from typing import ClassVar

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, transfer


class Euler(AbstractSolver):
    """Euler's method, which is DDIM without noise, on the rows of flows and DDPMs alike.

    Source: https://arxiv.org/abs/2206.00364, algorithm 1 without the second half; diffusers'
    EulerDiscreteScheduler and FlowMatchEulerDiscreteScheduler.
    """

    requires_key: ClassVar[bool] = False
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
        row = schedule[index]
        return transfer(x, x0, row.astype(x.dtype), schedule[index + 1].astype(x.dtype)), None
