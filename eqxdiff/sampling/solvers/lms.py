from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..schedule import Schedule
from ._base import AbstractSolver, Denoise, Noise, StepIndex, X, before, transfer


class LMS(AbstractSolver):
    """Linear multistep: integrates the polynomial through the last slopes.

    The slopes are of `x / alpha` in `sigma / alpha`, or with `straight` of `x / (alpha + sigma)` in
    `sigma / (alpha + sigma)`, which is the variable for flows. The state is the slopes of the steps
    before, the newest first.

    **Arguments:**

    - `straight`: the variable of the slopes.
    - `order`: how many slopes, from 1 to 4. A step h is stable where `h * |d slope / d x|` is at
        most 0.3 at order 4 and 1 at order 2. Guidance makes a flow's slope so steep that order 4
        diverges at 20 steps, so flows are offered at order 2.

    Source: k-diffusion's sample_lms; diffusers' LMSDiscreteScheduler, which integrates the
    polynomial numerically. Here the integral is exact.
    """

    straight: bool = eqx.field(static=True, default=False)
    order: int = eqx.field(static=True, default=4)

    requires_key: ClassVar[bool] = False
    evaluations: ClassVar[int] = 1

    def init(self, x: X, schedule: Schedule) -> Float[Array, "past *shape"]:
        return jnp.zeros((self.order - 1, *x.shape), x.dtype)

    def step(
        self,
        denoise: Denoise,
        x: X,
        x0: X,
        state: Float[Array, "past *shape"],
        schedule: Schedule,
        index: StepIndex,
        key: Noise | None,
    ) -> tuple[X, Float[Array, "past *shape"]]:
        at, to = schedule[index].astype(x.dtype), schedule[index + 1].astype(x.dtype)
        eps = (x - at.alpha * x0) / at.sigma
        slopes = jnp.concatenate([(eps - x0 if self.straight else eps)[None], state])

        def scale(row):
            return row.alpha + row.sigma if self.straight else row.alpha

        rows = [before(schedule, index, k).astype(x.dtype) for k in range(self.order)]
        known = jnp.stack([(scale(row) > 0) & (index >= k) for k, row in enumerate(rows)])
        nodes = jnp.stack([row.sigma / jnp.where(scale(row) > 0, scale(row), 1) for row in rows])
        weights = _integrals(nodes, known, to.sigma / scale(to))
        change = jnp.tensordot(weights[1:], slopes[1:] - slopes[0], 1)
        return transfer(x, x0, at, to) + scale(to) * change, slopes[:-1]


def _integrals(
    nodes: Float[Array, " k"], known: Bool[Array, " k"], end: Float[Array, ""]
) -> Float[Array, " k"]:
    """Returns the integrals of the Lagrange polynomials on the known nodes, from the first node to
    `end`.

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
