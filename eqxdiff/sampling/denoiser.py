"""Predictors, and the denoisers made from them.

A predictor is any callable `(x, row) -> output`, in the network's own parameterization. A denoiser
is any callable `(x, row) -> x0`, or an `AbstractDenoiser`, which may remember something from step
to step. All are usually modules whose fields hold the network and its conditions, so that they pass
through `jax.jit` as arguments.
"""

import abc
from collections.abc import Callable

import equinox as eqx
from jaxtyping import PyTree

from .ahead import AbstractNetwork
from .guidance import AbstractGuider, Network
from .parameterization import AbstractParameterization
from .schedule import Row, Schedule, X


Predictor = Callable[[X, Row], X]
Denoise = Callable[[X, Row], X]


class AbstractDenoiser(eqx.Module):
    """Computes the clean data x0 from noisy data, with a memory that `sample` carries along."""

    @abc.abstractmethod
    def init(self, x: X) -> PyTree:
        """Returns the memory before the first step. Its structure and shapes never change."""

    @abc.abstractmethod
    def recall(self, x: X, row: Row, memory: PyTree) -> tuple[X, PyTree]:
        """Returns x0, in the dtype of `x`, and the next memory."""

    @abc.abstractmethod
    def __call__(self, x: X, row: Row) -> X:
        """Returns x0 as it is without any step before."""


class Denoiser(AbstractDenoiser):
    """A predictor with the meaning of its output: `(x, row) -> x0`, in the dtype of `x`."""

    predict: Predictor
    parameterization: AbstractParameterization

    def init(self, x: X) -> None:
        return None

    def recall(self, x: X, row: Row, memory: None) -> tuple[X, None]:
        return self(x, row), None

    def __call__(self, x: X, row: Row) -> X:
        return self.parameterization.denoised(x, self.predict(x, row), row)


class GuidedDenoiser(AbstractDenoiser):
    """A network under guidance, with the memory of the guider.

    **Arguments:**

    - `network`: any callable `(x, row, condition) -> output`.
    - `conditions`: a PyTree whose arrays have a leading axis, one entry for each of the guider's
        `roles`. `stack_conditions` makes it.
    - `guider`: combines what the network says of each condition.
    - `parameterization`: the meaning of the network's output.
    """

    network: Network
    conditions: PyTree
    guider: AbstractGuider
    parameterization: AbstractParameterization

    def init(self, x: X) -> PyTree:
        return self.guider.init(x)

    def recall(self, x: X, row: Row, memory: PyTree) -> tuple[X, PyTree]:
        def predict(condition):
            return self.network(x, row, condition)

        output, memory = self.guider(predict, self.conditions, x, row, memory)
        return self.parameterization.denoised(x, output, row), memory

    def __call__(self, x: X, row: Row) -> X:
        return self.recall(x, row, self.init(x))[0]

    def ahead(self, x: X, schedule: Schedule) -> "GuidedDenoiser":
        """Returns the denoiser with all done that no step of the schedule changes.

        It can be asked for the schedule's rows alone: elsewhere its output is not a number.
        """
        network = self.network
        if not isinstance(network, AbstractNetwork):
            return self
        timesteps = schedule.timesteps
        one = lambda condition: network.ahead(x, timesteps, condition)
        conditions = eqx.filter_vmap(one)(self.conditions)
        return GuidedDenoiser(network.rest(), conditions, self.guider, self.parameterization)


class PlainDenoiser(AbstractDenoiser):
    """A callable `(x, row) -> x0` as a denoiser without memory."""

    function: Denoise

    def init(self, x: X) -> None:
        return None

    def recall(self, x: X, row: Row, memory: None) -> tuple[X, None]:
        return self.function(x, row), None

    def __call__(self, x: X, row: Row) -> X:
        return self.function(x, row)


def as_denoiser(denoiser: AbstractDenoiser | Denoise) -> AbstractDenoiser:
    """Returns the denoiser, or a plain callable wrapped as one."""
    return denoiser if isinstance(denoiser, AbstractDenoiser) else PlainDenoiser(denoiser)
