"""The meanings of a network's output: the data, the noise, or a velocity between them."""

import abc

import equinox as eqx
import jax.numpy as jnp

from .schedule import Row, X


class AbstractParameterization(eqx.Module):
    """Reads the clean data off a network's output at `x = alpha * x0 + sigma * eps`."""

    @abc.abstractmethod
    def denoised(self, x: X, output: X, row: Row) -> X:
        """Returns x0 in the dtype of `x`. It widens the output of a narrower network first."""

    @abc.abstractmethod
    def target(self, x0: X, eps: X, row: Row) -> X:
        """Returns the output of a perfect network, which training aims at."""


class Epsilon(AbstractParameterization):
    """The output is the noise (https://arxiv.org/abs/2006.11239).

    Where alpha is 0 the noise does not determine the data, and x0 is 0.
    """

    def denoised(self, x: X, output: X, row: Row) -> X:
        row = row.astype(x.dtype)
        known = row.alpha > 0
        x0 = (x - row.sigma * output.astype(x.dtype)) / jnp.where(known, row.alpha, 1)
        return jnp.where(known, x0, 0)

    def target(self, x0: X, eps: X, row: Row) -> X:
        return eps


class VPrediction(AbstractParameterization):
    """The output is `alpha * eps - sigma * x0`, on variance preserving rows
    (https://arxiv.org/abs/2202.00512, appendix D)."""

    def denoised(self, x: X, output: X, row: Row) -> X:
        row = row.astype(x.dtype)
        return row.alpha * x - row.sigma * output.astype(x.dtype)

    def target(self, x0: X, eps: X, row: Row) -> X:
        row = row.astype(x0.dtype)
        return row.alpha * eps - row.sigma * x0


class X0(AbstractParameterization):
    """The output is the data."""

    def denoised(self, x: X, output: X, row: Row) -> X:
        return output.astype(x.dtype)

    def target(self, x0: X, eps: X, row: Row) -> X:
        return x0


class Flow(AbstractParameterization):
    """The output is `eps - x0`, on straight rows (https://arxiv.org/abs/2209.03003)."""

    def denoised(self, x: X, output: X, row: Row) -> X:
        return x - row.sigma.astype(x.dtype) * output.astype(x.dtype)

    def target(self, x0: X, eps: X, row: Row) -> X:
        return eps - x0


def parameterization_of(prediction_type: str) -> AbstractParameterization:
    """Returns the meaning that a scheduler's config calls `"epsilon"`, `"v_prediction"` or
    `"sample"`."""
    return {"epsilon": Epsilon(), "v_prediction": VPrediction(), "sample": X0()}[prediction_type]
