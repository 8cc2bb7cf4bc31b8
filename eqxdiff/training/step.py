"""One step of training: gradients, optimizer, running average of the weights."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from .._dtypes import at_least_float32, float32_products
from .._types import PRNGKey, Scalar
from ..checkpoint.load import dotted


Metrics = dict[str, Scalar]

Loss = Callable[[PyTree, PyTree, Key[Array, " n"]], tuple[Scalar, Metrics]]
"""`(model, batch, keys)` to the mean loss of the batch's examples and further numbers to report.

Every array of the batch has a leading axis of examples, and there is a key for each example."""


class TrainState(eqx.Module):
    """All that changes from step to step.

    **Fields:**

    - `step`: the number of steps made.
    - `params`: the trained parameters in float32; the other leaves of the model are `None`.
    - `opt_state`: the state of the optimizer.
    - `ema`: the running average of `params`, or `None`.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree

    @classmethod
    def init(
        cls, params: PyTree, optimizer: optax.GradientTransformation, *, ema: bool = False
    ) -> Self:
        """Makes the state before the first step. It shares no buffer with `params`, because a step
        gives the buffers of its state away, each of which must exist once.
        """
        params = jax.tree.map(widened_copy, params)
        average = jax.tree.map(widened_copy, params) if ema else None
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

    @property
    def averaged(self) -> PyTree:
        """The running average of the parameters; the parameters themselves where there is none."""
        return self.params if self.ema is None else self.ema


class Task(eqx.Module):
    """All that stays the same from step to step.

    **Fields:**

    - `frozen`: the rest of the model: `eqx.combine(params, frozen)` is the whole.
    - `loss`: the loss of the whole model; any callable, such as a module with arrays of its own.
    - `optimizer`: any optimizer of Optax.
    - `key`: the source of all random numbers. Step `n` takes `jax.random.fold_in(key, n)`.
    - `ema_decay`: the share of the running average that stays in a step, in the long run.
    - `accumulate`: the number of parts that a batch is cut into, one in memory at a time.
    """

    frozen: PyTree
    loss: Loss
    optimizer: optax.GradientTransformation
    key: PRNGKey
    ema_decay: float = eqx.field(static=True, default=0.999)
    accumulate: int = eqx.field(static=True, default=1)


def widened_copy(x: Array) -> Float[Array, "..."]:
    """Copies an array in at least float32, also where its dtype stays the same."""
    return jnp.array(x, at_least_float32(x.dtype), copy=True)


def select(model: PyTree, patterns: Sequence[str]) -> PyTree:
    """Selects the leaves to train, as a filter for `eqx.partition`.

    A floating point array is selected where the start of its dotted path, such as
    `transformer.proj_out.weight`, matches one of the regular expressions.

    **Raises:** `ValueError` for an expression that matches nothing.
    """
    used: set[str] = set()

    def chosen(path: tuple[Any, ...], leaf: Any) -> bool:
        if not eqx.is_inexact_array(leaf):
            return False
        found = [pattern for pattern in patterns if re.match(pattern, dotted(path))]
        used.update(found)
        return bool(found)

    spec = jax.tree_util.tree_map_with_path(chosen, model)
    if missing := [pattern for pattern in patterns if pattern not in used]:
        raise ValueError(f"{missing[0]} matches no parameter of the model.")
    return spec


def gradients(
    task: Task, params: PyTree, batch: PyTree, keys: Key[Array, " n"]
) -> tuple[PyTree, Scalar, Metrics]:
    """Returns the gradients of the mean loss, the loss, and the further numbers that it reports.

    `task.accumulate` parts give the same numbers as the whole batch, up to rounding.

    **Raises:** `ValueError` where the batch cannot be cut into so many parts.
    """

    def loss(params: PyTree, batch: PyTree, keys: Array) -> tuple[Scalar, Metrics]:
        return task.loss(eqx.combine(params, task.frozen), batch, keys)

    part = eqx.filter_value_and_grad(loss, has_aux=True)
    if task.accumulate == 1:
        (value, metrics), grads = part(params, batch, keys)
        return grads, value, metrics
    if keys.shape[0] % task.accumulate:
        raise ValueError(f"A batch of {keys.shape[0]} is no multiple of {task.accumulate} parts.")
    cut = lambda x: x.reshape(task.accumulate, -1, *x.shape[1:])
    parts = jax.tree.map(cut, (batch, keys))
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        eqx.filter_eval_shape(part, params, *jax.tree.map(lambda x: x[0], parts)),
    )

    def add(total: PyTree, one: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, part(params, *one)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    (value, metrics), grads = jax.tree.map(lambda x: x / task.accumulate, total)
    return grads, value, metrics


@eqx.filter_jit(donate="all-except-first")
def train_step(task: Task, state: TrainState, batch: PyTree) -> tuple[TrainState, Scalar, Metrics]:
    """Makes one step. It gives the buffers of `state` and `batch` away: do not use them again.

    **Returns:** the next state, the loss before the step, and the further numbers that the loss
    reports, with the L2 norm of the gradients as `"gradient"`.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(jax.random.fold_in(task.key, state.step), count)
    grads, loss, metrics = gradients(task, state.params, batch, keys)
    with jax.numpy_dtype_promotion("standard"), float32_products(jnp.float32):
        updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, "gradient": l2_norm(grads)}
    ema = state.ema
    if ema is not None:
        ema = average(ema, params, ema_rate(task.ema_decay, state.step))
    return TrainState(state.step + 1, params, opt_state, ema), loss, metrics


def l2_norm(tree: PyTree) -> Scalar:
    """Returns the L2 norm of all numbers of a PyTree."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def ema_rate(decay: float, step: Int[Array, ""]) -> Scalar:
    """Returns the share of the average that stays in a step: little in the first steps, in which
    the weights change most."""
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def average(ema: PyTree, params: PyTree, rate: Scalar) -> PyTree:
    """Returns `rate` times the average plus `1 - rate` times the parameters."""
    return jax.tree.map(lambda e, p: e + (1 - rate).astype(e.dtype) * (p - e), ema, params)
