"""Distributions of the noise levels that training sees."""

import abc
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import PRNGKey, Scalar
from ..sampling import Row
from ..sampling.discrete import DiscreteSchedulerConfig, noise_levels


class AbstractLevels(eqx.Module):
    """A distribution of noise levels."""

    @abc.abstractmethod
    def sample(self, key: PRNGKey) -> Row:
        """Draws one level, in float32."""


class LogitNormal(AbstractLevels):
    """Levels of a rectified flow whose logit is normal, so that the middle levels are the most.

    **Fields:**

    - `mean`, `std`: the mean and the standard deviation of the logit of sigma before the shift.
    - `shift`: `sigma <- shift * sigma / (1 + (shift - 1) * sigma)`, as sampling shifts its levels.

    Source: https://arxiv.org/abs/2403.03206, section 3.1.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def sample(self, key: PRNGKey) -> Row:
        sigma = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (), jnp.float32))
        return flow_row(sigma, self.shift)


class Uniform(AbstractLevels):
    """Levels of a rectified flow that are uniform before the shift.

    **Fields:**

    - `shift`: as of `LogitNormal`.
    """

    shift: float = 1.0

    def sample(self, key: PRNGKey) -> Row:
        return flow_row(jax.random.uniform(key, (), jnp.float32), self.shift)


class Discrete(AbstractLevels):
    """The levels that a DDPM was trained on, all equally frequent.

    **Fields:**

    - `alpha`, `sigma`: the factors of the data and of the noise at each timestep.
    """

    alpha: Float[Array, " levels"]
    sigma: Float[Array, " levels"]

    @classmethod
    def init(cls, config: DiscreteSchedulerConfig) -> Self:
        """Makes the thousand levels of a `scheduler_config.json`."""
        rows = noise_levels(config)
        return cls(rows.alpha, rows.sigma)

    def sample(self, key: PRNGKey) -> Row:
        index = jax.random.randint(key, (), 0, self.alpha.shape[0])
        return Row(self.alpha[index], self.sigma[index], index.astype(jnp.float32))


def flow_row(sigma: Scalar, shift: float) -> Row:
    """Returns the row of a rectified flow at a level after the shift."""
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return Row(1 - sigma, sigma, 1000 * sigma)
