from typing import ClassVar

from ..._types import Scalar
from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, ancestral, gaussian, transfer


class DDIM(AbstractSolver):
    """Denoising diffusion implicit models without noise: straight to the next row.

    diffusers' DDIMScheduler ends each step at the timestep `1000 // steps` below, which is not
    always the timestep that it gives the network next; see `discrete_schedule`.

    Source: https://arxiv.org/abs/2010.02502; diffusers' DDIMScheduler.
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
        at, to = schedule[index].astype(x.dtype), schedule[index + 1].astype(x.dtype)
        return transfer(x, x0, at, to), None


class StochasticDDIM(AbstractSolver):
    """DDIM that renews a share of the noise that the reverse of the diffusion would renew.

    **Arguments:**

    - `eta`: the share: 0 is DDIM and 1 is DDPM.

    Source: https://arxiv.org/abs/2010.02502, equation 16; diffusers' DDIMScheduler with `eta`.
    """

    eta: Scalar

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
        noise = gaussian(key, index, x)
        return ancestral(x, x0, at, to, noise, self.eta.astype(x.dtype)), None
