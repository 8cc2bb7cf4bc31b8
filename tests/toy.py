"""Toy denoisers for the tests of sampling, and what diffusers computes with them."""

import functools
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from helpers import fake_tensor
from jaxtyping import Array, Float


SIZE = 12


class Toy(eqx.Module):
    """The network of tests/reference/solvers.py: `(x, row) -> output`."""

    mix: Float[Array, "size size"]
    phase: Float[Array, " size"]

    @classmethod
    def init(cls):
        mix = jnp.asarray(fake_tensor("mix", (SIZE, SIZE), 1.5))
        return cls(mix, jnp.asarray(fake_tensor("phase", (SIZE,), 5.0)))

    def __call__(self, x, row):
        t = row.timestep.astype(x.dtype) / 1000
        mixed = jnp.matmul(self.mix.astype(x.dtype), x, precision="highest")
        return jnp.tanh(mixed) * (0.5 + t) + 0.5 * jnp.cos(3 * t + self.phase.astype(x.dtype))


class Gaussian(eqx.Module):
    """The exact denoiser of data that is normal with this mean and standard deviation."""

    mean: Float[Array, "*shape"]
    deviation: Float[Array, "*shape"]

    def __call__(self, x, row):
        row = row.astype(x.dtype)
        mean, variance = self.mean.astype(x.dtype), self.deviation.astype(x.dtype) ** 2
        total = row.alpha**2 * variance + row.sigma**2
        return mean + row.alpha * variance * (x - row.alpha * mean) / total

    def flow(self, x, at, to):
        """Where the probability flow takes x from row `at` to row `to`, in closed form."""
        at, to = at.astype(x.dtype), to.astype(x.dtype)
        mean, variance = self.mean.astype(x.dtype), self.deviation.astype(x.dtype) ** 2
        spread = [jnp.sqrt(row.alpha**2 * variance + row.sigma**2) for row in (at, to)]
        return to.alpha * mean + (x - at.alpha * mean) * spread[1] / spread[0]


def noise():
    """The noise that the recorded trajectories start from."""
    return jnp.asarray(fake_tensor("noise", (SIZE,))) * 5


@functools.cache
def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "fixtures" / "solvers.npz") as file:
        return dict(file)
