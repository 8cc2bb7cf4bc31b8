"""The sampler is differentiable end to end: gradients against finite differences, in float64."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import fake_module, fake_tensor

from eqxdiff.models.flux1 import FluxCondition, Transformer, TransformerConfig
from eqxdiff.models.flux1.conditioning import FluxShared
from eqxdiff.models.flux1.predictor import FluxPredictor
from eqxdiff.sampling import (
    Euler,
    Flow,
    GuidedDenoiser,
    Heun,
    Unguided,
    flow_schedule,
    sample,
    stack_conditions,
)


CONFIG = TransformerConfig(
    attention_head_dim=8,
    axes_dims_rope=(4, 2, 2),
    in_channels=8,
    joint_attention_dim=6,
    num_attention_heads=2,
    num_layers=1,
    num_single_layers=2,
    pooled_projection_dim=5,
    guidance_embeds=True,
)
STEPS = 4


@pytest.fixture
def toy(x64):
    """A float64 transformer, a condition, noise, and a direction to look along."""
    double = lambda name, *shape: jnp.asarray(fake_tensor(name, shape), jnp.float64)
    model = fake_module(Transformer.init, CONFIG, dtype=jnp.float64)
    return (
        model,
        FluxCondition(double("txt", 3, 6), double("pooled", 5)),
        double("noise", 4, 4, 2),
        double("direction", 4, 4, 2),
    )


def loss(model, condition, scale, noise, direction, *, remat="none", solver=None):
    network = FluxPredictor(model, FluxShared(scale), jnp.dtype(jnp.float64))
    denoiser = GuidedDenoiser(network, stack_conditions(condition), Unguided(), Flow())
    x = sample(denoiser, noise, flow_schedule(STEPS), solver or Euler(), remat=remat)
    return jnp.sum(jnp.square(x) * direction)


def check_gradient(f, x, h=1e-5):
    """Along one direction, against the fourth-order central difference."""
    along = jnp.asarray(fake_tensor("along", x.shape), x.dtype)
    both = jax.jit(jax.value_and_grad(f))
    gradient = jnp.vdot(both(x)[1], along)
    at = lambda step: both(x + step * h * along)[0]
    expected = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    assert abs(gradient - expected) < 1e-6 * abs(expected)


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=["euler", "heun"])
def test_the_gradient_of_the_prompt_agrees_with_finite_differences(toy, solver):
    model, condition, noise, direction = toy
    scale = jnp.asarray(3.5, jnp.float64)

    def f(txt):
        moved = FluxCondition(txt, condition.pooled)
        return loss(model, moved, scale, noise, direction, solver=solver)

    check_gradient(f, condition.txt)


def test_the_gradient_of_a_weight_agrees_with_finite_differences(toy):
    model, condition, noise, direction = toy
    scale = jnp.asarray(3.5, jnp.float64)
    where = lambda model: model.single_transformer_blocks.attn.to_q.weight

    def f(weight):
        return loss(eqx.tree_at(where, model, weight), condition, scale, noise, direction)

    check_gradient(f, where(model))


@pytest.mark.parametrize("remat", ["step", "sqrt"])
def test_rematerialisation_changes_no_gradient(toy, remat):
    model, condition, noise, direction = toy
    scale = jnp.asarray(3.5, jnp.float64)

    def gradient(model, remat):
        f = lambda c: loss(model, c, scale, noise, direction, remat=remat)
        return jax.jit(jax.grad(f))(condition).txt

    blocks = dataclasses.replace(model, remat=True)
    assert jnp.allclose(gradient(blocks, remat), gradient(model, "none"), rtol=1e-10, atol=1e-12)


def test_guidance_and_conditions_can_be_vmapped(toy):
    model, condition, noise, direction = toy
    scales = jnp.asarray([1.0, 3.5], jnp.float64)
    one = jax.jit(lambda scale: loss(model, condition, scale, noise, direction))
    both = jax.jit(jax.vmap(one))(scales)
    assert jnp.allclose(both, jnp.stack([one(scale) for scale in scales]), rtol=1e-9)
    assert abs(both[0] - both[1]) > 1e-3 * abs(both[0])
