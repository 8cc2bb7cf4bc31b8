from typing import ClassVar

from ..schedule import Schedule, add_noise
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, gaussian


class LCM(AbstractSolver):
    """Latent consistency sampling: all the way to the data, then new noise up to the next row.

    It is for models distilled to be consistent. The boundary condition of the distillation mixes x
    itself into the denoised data near timestep 0 (sigma_data 0.5, timesteps scaled by 10).

    Source: https://arxiv.org/abs/2310.04378, section 4; diffusers' LCMScheduler.
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
        time = 10 * schedule[index].timestep.astype(x.dtype)
        skip = 0.25 / (time**2 + 0.25)
        out = time / (time**2 + 0.25) ** 0.5
        data = skip * x + out * x0
        return add_noise(data, gaussian(key, index, x), schedule[index + 1]), None
