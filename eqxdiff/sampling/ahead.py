"""What a network computes once, before the loop: all that no step changes."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._types import Scalar
from .guidance import Network
from .schedule import Row, X


class AbstractNetwork(eqx.Module):
    """A network that does a part of its work ahead: once for a picture, not in every step.

    A plain callable `(x, row, condition) -> output` is a network too, without such a part.
    """

    @abc.abstractmethod
    def __call__(self, x: X, row: Row, condition: PyTree) -> X:
        """Computes the output from the condition alone, at any noise level."""

    @abc.abstractmethod
    def ahead(self, x: X, timesteps: Float[Array, " rows"], condition: PyTree) -> PyTree:
        """Computes all that depends on the condition, the timesteps and the shape of `x` alone.

        **Arguments:**

        - `timesteps`: all that the network will be asked for.

        **Returns:** the condition for `rest`.
        """

    @abc.abstractmethod
    def rest(self) -> Network:
        """Returns the network for such conditions, without the weights that `ahead` has used up.

        It computes nothing: its leaves are leaves of this network.
        """


class RowTable(eqx.Module):
    """What a network computed ahead for each of some timesteps.

    **Fields:**

    - `timesteps`: in any order.
    - `values`: arrays with a leading axis of the same length.
    """

    timesteps: Float[Array, " rows"]
    values: PyTree

    def __call__(self, timestep: Scalar) -> PyTree:
        """Returns the values of a timestep, which are not a number where the table lacks it."""
        found = self.timesteps == timestep
        index = jnp.argmax(found)
        return jax.tree.map(lambda v: jnp.where(found[index], v[index], jnp.nan), self.values)
