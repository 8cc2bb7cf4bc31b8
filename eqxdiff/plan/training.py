"""The step that trains a LoRA as shapes: a frozen denoiser, adapters, their gradients and AdamW.

The texts and latents are encoded before, so that the denoiser alone is held; each block is computed
again in the backward pass, where the network can do so.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ..nn import Adapted, Linear
from ..pipeline import Job
from .shapes import Program, Skeletons, make_programs


RANK = 16
"""The rank of the adapters of all linear layers."""


def training_program(skeletons: Skeletons, job: Job, batch_size: int) -> Program:
    """Returns the program of one step on so many pictures like that of a job."""
    programs, _ = make_programs(skeletons, job, batch_size, ahead=False)
    step = next(one for one in programs if one.name == "step")
    batch, _, x, _ = step.inputs
    blueprint, optimizer = skeletons.blueprint, optax.adamw(1e-4)
    linear = lambda node: isinstance(node, Linear)
    layers = [one for one in jax.tree.leaves(step.weights, is_leaf=linear) if linear(one)]
    adapters = [_adapter(one.weight.shape) for one in layers]
    state = jax.eval_shape(optimizer.init, adapters)

    def loss(adapters: PyTree, weights: Any, batch: PyTree, x: Any) -> Any:
        left = iter(adapters)

        def adapted(node: Any) -> Any:
            if not linear(node):
                return node
            down, up = next(left)
            return Adapted(node, jnp.ones((*down.shape[:-3], 1), jnp.float32), down, up)

        def one(example: Any, x: Any) -> Any:
            model, dtype = blueprint.model, blueprint.compute_dtype
            network = model.network(modules, example.shared, dtype)
            condition = jax.tree.map(lambda leaf: leaf[0], example.conditions)
            return jnp.mean(jnp.square(network(x, example.recipe.schedule[0], condition)))

        modules = {
            name: _rematerialised(jax.tree.map(adapted, module, is_leaf=linear))
            for name, module in weights.items()
        }
        with blueprint.computing():
            return jnp.mean(jax.vmap(one)(batch, x))

    def train(weights: Any, adapters: PyTree, state: PyTree, batch: PyTree, x: Any) -> PyTree:
        value, grads = jax.value_and_grad(loss)(adapters, weights, batch, x)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state, value

    inputs = adapters, state, batch, x
    return Program("train", "denoiser", step.weights, inputs, train, None, 1, donated=True)


def _adapter(shape: tuple[int, ...]) -> tuple[Any, Any]:
    *stack, outputs, size = shape
    down = jax.ShapeDtypeStruct((*stack, 1, RANK, size), jnp.float32)
    return down, jax.ShapeDtypeStruct((*stack, outputs, 1, RANK), jnp.float32)


def _rematerialised(module: eqx.Module) -> eqx.Module:
    """Returns a network that computes each block again in the backward pass, where it can."""
    names = {field.name for field in dataclasses.fields(module)}
    return dataclasses.replace(module, remat=True) if "remat" in names else module
