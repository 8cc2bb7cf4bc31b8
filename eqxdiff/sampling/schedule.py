"""Schedules as data: rows of (alpha, sigma, timestep)."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int
from numpy.typing import ArrayLike

from .._errors import SettingError
from .._types import Scalar


X = Float[Array, "*shape"]
"""Data, noisy or clean: one example of any shape."""


class Row(eqx.Module):
    """One noise level, `x = alpha * x0 + sigma * eps`, or several stacked.

    **Arguments:**

    - `alpha`, `sigma`: what the data and the unit noise are multiplied by.
    - `timestep`: what the network is told, in thousandths: 0 is data and 1000 is noise.
    """

    alpha: Float[Array, "*rows"]
    sigma: Float[Array, "*rows"]
    timestep: Float[Array, "*rows"]

    def astype(self, dtype: DTypeLike) -> "Row":
        """The same level in another dtype."""
        return Row(*(v.astype(dtype) for v in (self.alpha, self.sigma, self.timestep)))


class Schedule(eqx.Module):
    """The noise levels that sampling goes through, from row 0, where it starts, to the last.

    The rows are variance preserving (`alpha**2 + sigma**2 == 1`) for models trained as DDPMs and
    straight (`alpha + sigma == 1`) for flows. A sampler that is written for the exploding form
    `z = x0 + s * eps`, such as k-diffusion's, walks through the same rows with `z = x / alpha` and
    `s = sigma / alpha`. `alpha` may be 0 in row 0 (zero terminal SNR), and `sigma` need not be 0 in
    the last row.

    **Arguments:**

    - `alpha`, `sigma`, `timestep`: as in `Row`, one value for each step and one more.
    - `start`: what unit noise is multiplied by to start at row 0. One for most; `sigma[0]` where
        the reference sampler of a model starts from noise with no trace of a mean.
    - `middle`: for solvers that look at a level within each step (`AbstractSolver.middle`): one row
        a step.
    """

    alpha: Float[Array, " rows"]
    sigma: Float[Array, " rows"]
    timestep: Float[Array, " rows"]
    start: Scalar
    middle: Row | None = None

    @classmethod
    def init(
        cls,
        alpha: ArrayLike,
        sigma: ArrayLike,
        timestep: ArrayLike,
        *,
        start: ArrayLike = 1.0,
        middle: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    ) -> "Schedule":
        """Rounds the numbers, computed in whatever precision, to float32 once."""

        def array(x):
            return jnp.asarray(np.asarray(x), jnp.float32)

        return cls(
            array(alpha),
            array(sigma),
            array(timestep),
            array(start),
            None if middle is None else Row(*map(array, middle)),
        )

    @property
    def steps(self) -> int:
        return self.alpha.shape[0] - 1

    def __getitem__(self, index: Int[Array, ""] | int) -> Row:
        return Row(self.alpha[index], self.sigma[index], self.timestep[index])

    def within(self, index: Int[Array, ""] | int) -> Row:
        """The row within the step that starts at row `index`."""
        if self.middle is None:
            raise ValueError("This schedule was made for a solver that needs no rows within steps.")
        rows = self.middle
        return Row(rows.alpha[index], rows.sigma[index], rows.timestep[index])

    def since(self, first: int) -> "Schedule":
        """The schedule from row `first` on: where image-to-image starts with `add_noise`.

        **Raises:** `SettingError` where no step is left.
        """
        if not 0 <= first < self.steps:
            raise SettingError(f"Step {first} is not among the {self.steps} steps of the schedule.")
        rows = self.middle
        if rows is not None:
            rows = Row(rows.alpha[first:], rows.sigma[first:], rows.timestep[first:])
        return Schedule(
            self.alpha[first:], self.sigma[first:], self.timestep[first:], self.start, rows
        )


def add_noise(x0: X, noise: X, row: Row) -> X:
    """`alpha * x0 + sigma * noise`."""
    row = row.astype(x0.dtype)
    return row.alpha * x0 + row.sigma * noise
