from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..schedule import Row, Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, transfer


_ADAMS_BASHFORTH = np.array(
    [[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]],
)
"""One row for each number of noises known before: the weights, the newest first, in 24ths."""


class PNDM(AbstractSolver):
    """Pseudo linear multistep (PLMS): Adams and Bashforth's formulas for the predicted noise.

    The first step denoises twice and takes the mean. The state is the noises of the three steps
    before, the newest first.

    Where a model predicts v, diffusers' PNDMScheduler applies the formulas to v, which makes them
    of first order. Here they apply to the noise for every model, as in the paper, and are of second
    order. diffusers also steps to other levels with linspace and trailing spacing; see
    `discrete_schedule`. A start by Runge and Kutta's method (`skip_prk_steps=False`) is not
    offered: no published latent model uses it.

    Source: https://arxiv.org/abs/2202.09778, equation 12; diffusers' PNDMScheduler.
    """

    requires_key: ClassVar[bool] = False
    evaluations: ClassVar[int] = 1

    def init(self, x: X, schedule: Schedule) -> Float[Array, "3 *shape"]:
        return jnp.zeros((3, *x.shape), x.dtype)

    def step(
        self,
        denoise: Denoise,
        x: X,
        x0: X,
        state: Float[Array, "3 *shape"],
        schedule: Schedule,
        index: StepIndex,
        key: Noise | None,
    ) -> tuple[X, Float[Array, "3 *shape"]]:
        at, to = schedule[index].astype(x.dtype), schedule[index + 1].astype(x.dtype)
        euler = transfer(x, x0, at, to)
        known = jnp.concatenate([_noise(x, x0, at)[None], state])

        def first():
            if schedule.steps == 1:
                return known[0]
            return (known[0] + _noise(euler, denoise(euler, schedule[index + 1]), to)) / 2

        def later():
            weights = jnp.asarray(_ADAMS_BASHFORTH / 24, x.dtype)[jnp.minimum(index, 3)]
            return jnp.tensordot(weights, known, 1)

        eps = jax.lax.cond(index == 0, first, later)
        return euler + (to.sigma - to.alpha * at.sigma / at.alpha) * (eps - known[0]), known[:-1]


def _noise(x: X, x0: X, row: Row) -> X:
    return (x - row.alpha * x0) / row.sigma
