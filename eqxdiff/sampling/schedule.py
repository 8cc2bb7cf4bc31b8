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

    - `alpha`, `sigma`: the factors of the data and of the unit noise.
    - `timestep`: the network's input for this level, in thousandths: 0 is data and 1000 is noise.
    """

    alpha: Float[Array, "*rows"]
    sigma: Float[Array, "*rows"]
    timestep: Float[Array, "*rows"]

    def astype(self, dtype: DTypeLike) -> "Row":
        """Returns the same level in another dtype."""
        return Row(*(v.astype(dtype) for v in (self.alpha, self.sigma, self.timestep)))


class Schedule(eqx.Module):
    """The noise levels that sampling goes through, from row 0, where it starts, to the last.

    The rows are variance preserving (`alpha**2 + sigma**2 == 1`) for models trained as DDPMs and
    straight (`alpha + sigma == 1`) for flows. A sampler that is written for the exploding form
    `z = x0 + s * eps`, such as k-diffusion's, goes through the same rows with `z = x / alpha` and
    `s = sigma / alpha`. `alpha` may be 0 in row 0 (zero terminal SNR), and `sigma` need not be 0 in
    the last row. There z is larger than x, by 4e-4 at the smallest level of Stable Diffusion: where
    `final_sigmas_type` is `"sigma_min"`, Euler in diffusers hands on z, and here all samplers hand
    on x. From zero terminal SNR z is 4096 times x, and loses digits in float32 that x keeps.

    **Arguments:**

    - `alpha`, `sigma`, `timestep`: as in `Row`, one value for each step and one more.
    - `start`: the factor of unit noise at row 0. It is 1 for most samplers, and `sigma[0]` for
        those whose reference starts from noise without a mean.
    - `middle`: one row a step, for solvers that evaluate at a level within each step.
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
        """Makes a schedule from numbers of any precision, which it rounds to float32 once."""

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
        """The number of steps."""
        return self.alpha.shape[0] - 1

    @property
    def timesteps(self) -> Float[Array, " all_rows"]:
        """The timesteps of all rows, with those within steps: all that a solver asks for."""
        if self.middle is None:
            return self.timestep
        return jnp.concatenate([self.timestep, self.middle.timestep])

    def __getitem__(self, index: Int[Array, ""] | int) -> Row:
        return Row(self.alpha[index], self.sigma[index], self.timestep[index])

    def within(self, index: Int[Array, ""] | int) -> Row:
        """Returns the row within the step that starts at row `index`.

        **Raises:** `ValueError` where the schedule has no rows within steps.
        """
        if self.middle is None:
            raise ValueError("This schedule has no rows within steps, which the solver needs.")
        rows = self.middle
        return Row(rows.alpha[index], rows.sigma[index], rows.timestep[index])

    def since(self, first: int) -> "Schedule":
        """Returns the schedule from row `first` on. Image to image starts there, with `add_noise`.

        **Raises:** `SettingError` where no step is left.
        """
        if not 0 <= first < self.steps:
            raise SettingError(
                f"The schedule has {self.steps} steps, so it cannot begin at step {first}."
            )
        rows = self.middle
        if rows is not None:
            rows = Row(rows.alpha[first:], rows.sigma[first:], rows.timestep[first:])
        return Schedule(
            self.alpha[first:], self.sigma[first:], self.timestep[first:], self.start, rows
        )


def add_noise(x0: X, noise: X, row: Row) -> X:
    """Returns `alpha * x0 + sigma * noise`."""
    row = row.astype(x0.dtype)
    return row.alpha * x0 + row.sigma * noise
