from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, before, transfer


class LMS(AbstractSolver):
    """Linear multistep: integrates the polynomial through the last four slopes.

    Slopes are of `x / alpha` in `sigma / alpha`, or with `straight` of `x / (alpha + sigma)` in
    `sigma / (alpha + sigma)`, which is the variable for flows. The state is the three slopes
    before, the newest first.

    Source: k-diffusion's sample_lms; diffusers' LMSDiscreteScheduler, which integrates numerically
    what is exact here.
    """

    straight: bool = eqx.field(static=True, default=False)

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
        eps = (x - at.alpha * x0) / at.sigma
        slopes = jnp.concatenate([(eps - x0 if self.straight else eps)[None], state])

        def scale(row):
            return row.alpha + row.sigma if self.straight else row.alpha

        rows = [before(schedule, index, k).astype(x.dtype) for k in range(4)]
        known = jnp.stack([(scale(row) > 0) & (index >= k) for k, row in enumerate(rows)])
        nodes = jnp.stack([row.sigma / jnp.where(scale(row) > 0, scale(row), 1) for row in rows])
        weights = _integrals(nodes, known, to.sigma / scale(to))
        change = jnp.tensordot(weights[1:], slopes[1:] - slopes[0], 1)
        return transfer(x, x0, at, to) + scale(to) * change, slopes[:-1]


def _integrals(
    nodes: Float[Array, " k"], known: Bool[Array, " k"], end: Float[Array, ""]
) -> Float[Array, " k"]:
    """The integrals of the Lagrange polynomials on the known nodes, from the first to `end`.

    Gauss's rule with two points is exact for cubics.
    """
    others = known & known[:, None] & ~jnp.eye(len(nodes), dtype=bool)
    differences = jnp.where(others, nodes[:, None] - nodes, 1)
    half = (end - nodes[0]) / 2
    total = jnp.zeros_like(nodes)
    for point in (-(3**-0.5), 3**-0.5):
        at = nodes[0] + half * (1 + point)
        total += jnp.prod(jnp.where(others, at - nodes, 1) / differences, axis=1)
    return jnp.where(known & known[0], half * total, 0)
