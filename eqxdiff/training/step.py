"""One step of training: gradients, optimizer, average of the weights."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from .._types import PRNGKey, Scalar
from ..checkpoint.load import dotted


Metrics = dict[str, Scalar]

Loss = Callable[[PyTree, PyTree, Key[Array, " n"]], tuple[Scalar, Metrics]]
"""`(model, batch, keys)` to the mean loss of the batch's examples and what else to report. Every
array of the batch has a leading axis of examples, and there is a key for each."""


class TrainState(eqx.Module):
    """All that changes from step to step.

    **Fields:**

    - `step`: the steps made.
    - `params`: the trained part of the model, in float32; the rest is `None`.
    - `opt_state`: the optimizer's.
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
        """The state before the first step. `params` is widened to float32."""
        params = jax.tree.map(widen, params)
        # copies: a state's buffers are given away one by one
        average = jax.tree.map(lambda x: x.copy(), params) if ema else None
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

    @property
    def averaged(self) -> PyTree:
        """The running average of the parameters, or the parameters where there is none."""
        return self.params if self.ema is None else self.ema


class Task(eqx.Module):
    """All that stays the same from step to step.

    **Fields:**

    - `frozen`: the part of the model that is not trained: `eqx.combine(params, frozen)` is whole.
    - `loss`: of the whole model; any callable, such as a module with arrays of its own.
    - `optimizer`: any of Optax.
    - `key`: of all that is random. Step `n` takes `jax.random.fold_in(key, n)`.
    - `ema_decay`: how much of the running average stays in a step, in the long run.
    - `accumulate`: how many parts the batch is cut into, one in memory at a time.
    """

    frozen: PyTree
    loss: Loss
    optimizer: optax.GradientTransformation
    key: PRNGKey
    ema_decay: float = eqx.field(static=True, default=0.999)
    accumulate: int = eqx.field(static=True, default=1)


def widen(x: Array) -> Float[Array, "..."]:
    """Float32 master weights of narrower ones."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def select(model: PyTree, patterns: Sequence[str]) -> PyTree:
    """Which leaves to train, as a filter for `eqx.partition`.

    Those floating point arrays of which the start of the dotted path, such as
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
    """The gradients of the mean loss, the loss, and what else it reports.

    With `task.accumulate` the same up to rounding, in as many parts.

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
    """One step. The buffers of `state` and `batch` are given away.

    **Returns:** the next state, the loss before the step, and what else the loss reports, with the
    L2 norm of the gradients as `"gradient"`.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(jax.random.fold_in(task.key, state.step), count)
    grads, loss, metrics = gradients(task, state.params, batch, keys)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, "gradient": l2_norm(grads)}
    ema = state.ema
    if ema is not None:
        ema = average(ema, params, ema_rate(task.ema_decay, state.step))
    return TrainState(state.step + 1, params, opt_state, ema), loss, metrics


def l2_norm(tree: PyTree) -> Scalar:
    """The L2 norm of all numbers of a PyTree."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def ema_rate(decay: float, step: Int[Array, ""]) -> Scalar:
    """How much of the average stays in a step: little at first, when it is far from converged."""
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def average(ema: PyTree, params: PyTree, rate: Scalar) -> PyTree:
    """`rate` times the average and the rest of the parameters."""
    return jax.tree.map(lambda e, p: e + (1 - rate).astype(e.dtype) * (p - e), ema, params)
