"""Guiders: how the network's outputs for several conditions become one."""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from .._dtypes import at_least_float32
from .._errors import SettingError
from .._types import Scalar
from ..sharding import constrain, ways
from .schedule import Row, Schedule, X


Network = Callable[[X, Row, PyTree], X]
Predict = Callable[[PyTree], X]


class AbstractGuider(eqx.Module):
    """Combines what a network says of several conditions, with a memory from step to step.

    - `roles`: the conditions that the guider wants, in the order of their leading axis. The first
        is `"prompt"`.
    """

    roles: eqx.AbstractClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def init(self, x: X) -> PyTree:
        """Returns the memory before the first step. Its structure and shapes never change."""

    @abc.abstractmethod
    def __call__(
        self, predict: Predict, conditions: PyTree, x: X, row: Row, memory: PyTree
    ) -> tuple[X, PyTree]:
        """Computes the guided output at `(x, row)`.

        **Arguments:**

        - `predict`: `condition -> output`: the network at `(x, row)`, for one condition.
        - `conditions`: a PyTree whose arrays have a leading axis with one entry for each role.
        - `x`, `row`: the noisy data and its noise level.
        - `memory`: what the step before, or `init`, returned.

        **Returns:** the output, in the network's parameterization, and the next memory.
        """


class Interval(eqx.Module):
    """The part of sampling in which guidance, or a ControlNet, acts.

    **Arguments:**

    - `first`, `last`: it acts from the timestep `first`, included, down to `last`, excluded.
    """

    first: Scalar
    last: Scalar

    @classmethod
    def over(cls, schedule: Schedule, start: float, end: float, *, name: str) -> "Interval":
        """Makes the interval from parts of the schedule's steps.

        A step is in the interval where it begins at or after `start` and ends at or before `end`.
        A schedule cut by `since` is divided anew: its own first step begins at 0. Steps are
        counted, not calls of the network, so that an interval means the same steps with every
        solver. (In diffusers, PNDM counts one more than there are steps.)

        **Arguments:**

        - `start`, `end`: parts of all steps, from 0 to 1.
        - `name`: what the error calls that which acts, such as `"Guidance"`.

        **Raises:** `SettingError` where no step is in the interval.
        """
        n = schedule.steps
        acts = [i for i in range(n) if i / n >= start and (i + 1) / n <= end]
        if not acts:
            raise SettingError(
                f"{name} that acts from {start:g} to {end:g} of the way acts on none of {n} steps."
            )
        times = np.asarray(schedule.timestep)
        first = np.inf if acts[0] == 0 else times[acts[0]]
        last = -1.0 if acts[-1] == n - 1 else times[acts[-1] + 1]
        return cls(jnp.asarray(first, jnp.float32), jnp.asarray(last, jnp.float32))

    def contains(self, row: Row) -> Bool[Array, "*rows"]:
        """Returns whether it acts at this noise level."""
        return (self.last < row.timestep) & (row.timestep <= self.first)


class Unguided(AbstractGuider):
    """The network's output for the prompt, as it is."""

    roles: ClassVar[tuple[str, ...]] = ("prompt",)

    def init(self, x: X) -> None:
        return None

    def __call__(
        self, predict: Predict, conditions: PyTree, x: X, row: Row, memory: None
    ) -> tuple[X, None]:
        return predict(condition_at(conditions, 0)), None


class ClassifierFree(AbstractGuider):
    """`u + scale * (c - u)` of the outputs for the prompt, c, and for the negative prompt, u.

    **Arguments:**

    - `scale`: 1 gives the output for the prompt; then `Unguided` does so in half the time.
    - `rescale`: as in `classifier_free`; `None` leaves it out of the program.
    - `interval`: where guidance acts; outside, the scale is 1. `None` is everywhere.
        Source: https://arxiv.org/abs/2404.07724.
    - `sequential`: one call of the network after the other instead of one on both, to save memory.

    Source: https://arxiv.org/abs/2207.12598.
    """

    scale: Scalar
    rescale: Scalar | None = None
    interval: Interval | None = None
    sequential: bool = eqx.field(static=True, default=False)

    roles: ClassVar[tuple[str, ...]] = ("prompt", "negative")

    def init(self, x: X) -> None:
        return None

    def __call__(
        self, predict: Predict, conditions: PyTree, x: X, row: Row, memory: None
    ) -> tuple[X, None]:
        both = predict_each(predict, conditions, sequential=self.sequential)
        scale = self.scale
        if self.interval is not None:
            scale = jnp.where(self.interval.contains(row), scale, jnp.ones_like(scale))
        return classifier_free(both[0], both[1], scale, self.rescale), None


class Guided(eqx.Module):
    """The predictor of a network under guidance, without the guider's memory.

    **Arguments:** as of `GuidedDenoiser`.
    """

    network: Network
    conditions: PyTree
    guider: AbstractGuider

    def __call__(self, x: X, row: Row) -> X:
        def predict(condition):
            return self.network(x, row, condition)

        return self.guider(predict, self.conditions, x, row, self.guider.init(x))[0]


class Conditioned(eqx.Module):
    """The predictor of a network given one condition.

    **Arguments:**

    - `network`: any callable `(x, row, condition) -> output`.
    - `condition`: any PyTree.
    """

    network: Network
    condition: PyTree

    def __call__(self, x: X, row: Row) -> X:
        return self.network(x, row, self.condition)


def stack_conditions(*conditions: PyTree) -> PyTree:
    """Stacks conditions of one structure, in the order of a guider's roles, for `Guided`."""
    arrays, static = eqx.partition(conditions[0], eqx.is_array)
    others = [eqx.filter(condition, eqx.is_array) for condition in conditions[1:]]
    return eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), arrays, *others), static)


def condition_at(conditions: PyTree, index: int) -> PyTree:
    """Returns one of the stacked conditions."""
    return jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, conditions)


def predict_each(predict: Predict, conditions: PyTree, *, sequential: bool) -> X:
    """Returns the outputs for all stacked conditions, on a leading axis, which the axis `cfg` of
    a mesh splits.

    **Arguments:**

    - `sequential`: call the network on one after the other, to save memory.
    """
    arrays, static = eqx.partition(conditions, eqx.is_array)

    def call(arrays):
        return predict(eqx.combine(arrays, static))

    if sequential:
        return jax.lax.map(call, arrays)
    count, size = jax.tree.leaves(arrays)[0].shape[0], ways("cfg")
    if size == 1 or count % size:
        return jax.vmap(call)(arrays)
    arrays = jax.tree.map(lambda x: constrain(x, "roles", *[None] * (x.ndim - 1)), arrays)
    return jax.vmap(call, spmd_axis_name="cfg")(arrays)


def classifier_free(
    conditional: X, unconditional: X, scale: Scalar, rescale: Scalar | None = None
) -> X:
    """Computes `u + scale * (c - u)` of two outputs for one example, in at least float32.

    **Arguments:**

    - `conditional`, `unconditional`: the network's outputs.
    - `scale`: the guidance scale.
    - `rescale`: how far to go back to the standard deviation, over the whole example, of the
        conditional output: 0 is not at all and 1 all the way.
        Source: https://arxiv.org/abs/2305.08891, section 3.4.
    """
    wide = at_least_float32(conditional.dtype)
    c, u = conditional.astype(wide), unconditional.astype(wide)
    guided = u + scale.astype(wide) * (c - u)
    if rescale is None:
        return guided
    amount = rescale.astype(wide)
    return guided * (amount * (jnp.std(c) / jnp.std(guided)) + (1 - amount))
