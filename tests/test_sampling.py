import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_tensor
from toy import SIZE, Toy, noise

from eqxdiff.sampling import (
    ClassifierFree,
    Conditioned,
    Denoiser,
    DPMpp2M,
    Euler,
    Flow,
    Guided,
    Heun,
    UniPC,
    begin,
    flow_schedule,
    sample,
    stack_conditions,
    start,
    step,
)


class Network(eqx.Module):
    toy: Toy

    def __call__(self, x, row, text):
        return self.toy(x + text, row)


NETWORK = Network(Toy.init())
TEXT = jnp.asarray(fake_tensor("text", (SIZE,)))
DENOISER = Denoiser(Conditioned(NETWORK, TEXT), Flow())


def guided(text, scale):
    texts = stack_conditions(text, jnp.zeros_like(text))
    return Denoiser(Guided(NETWORK, texts, ClassifierFree(jnp.asarray(scale))), Flow())


@pytest.mark.parametrize("remat", ["none", "step", "sqrt"])
@pytest.mark.parametrize("steps", [1, 7])
def test_rematerialisation_changes_neither_values_nor_gradients(remat, steps):
    def loss(x, remat):
        return jnp.sum(sample(DENOISER, x, flow_schedule(steps), Heun(straight=True), remat=remat))

    value, gradient = jax.value_and_grad(loss)(noise(), "none")
    value2, gradient2 = jax.value_and_grad(loss)(noise(), remat)
    np.testing.assert_allclose(value2, value, rtol=1e-6)
    np.testing.assert_allclose(gradient2, gradient, rtol=1e-5, atol=1e-6)


def test_the_loop_of_jitted_steps_is_the_scan():
    schedule, solver = flow_schedule(5), Euler()
    jitted = eqx.filter_jit(step)
    x = start(noise(), schedule)
    state = begin(DENOISER, x, schedule, solver)
    for index in range(schedule.steps):
        x, _, state = jitted(DENOISER, x, state, schedule, jnp.asarray(index), solver)
    np.testing.assert_allclose(x, sample(DENOISER, noise(), schedule, solver), rtol=1e-5)


def test_nothing_that_a_user_changes_compiles_again():
    """Prompt, seed, guidance, rescaling and the rows of the schedule are data."""
    compiles = []

    @eqx.filter_jit
    def run(denoiser, x, schedule):
        compiles.append(1)
        return sample(denoiser, x, schedule, Euler())

    run(guided(TEXT, 2.0), noise(), flow_schedule(4))
    run(guided(2 * TEXT, 2.0), noise(), flow_schedule(4))
    run(guided(TEXT, 5.0), noise() * 2, flow_schedule(4))
    run(guided(TEXT, 2.0), noise(), flow_schedule(4, shift=3.0))
    assert len(compiles) == 1
    run(guided(TEXT, 2.0), noise(), flow_schedule(5))
    assert len(compiles) == 2


def test_sampling_maps_over_guidance_conditioning_and_noise():
    scales, texts = jnp.asarray([1.0, 4.0]), jnp.stack([TEXT, 2 * TEXT])
    noises = jnp.stack([noise(), -noise()])

    def run(scale, text, x):
        return sample(guided(text, scale), x, flow_schedule(4), Euler())

    mapped = jax.vmap(run)(scales, texts, noises)
    for k in range(2):
        alone = run(scales[k], texts[k], noises[k])
        np.testing.assert_allclose(mapped[k], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "remat"),
    [
        (Euler(), "none"),
        (Euler(), "sqrt"),
        (Heun(straight=True), "none"),
        (Heun(straight=True), "step"),
        (DPMpp2M(), "none"),
        (UniPC(), "none"),
    ],
)
def test_gradients_agree_with_finite_differences(x64, solver, remat):
    """With respect to the conditioning, one weight, the guidance scale and the schedule."""
    text = jnp.asarray(np.asarray(TEXT, np.float64))
    network = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), NETWORK)
    schedule = jax.tree.map(lambda a: a.astype(jnp.float64), flow_schedule(4, shift=2.0))
    x = jnp.asarray(np.asarray(noise(), np.float64))

    def loss(t):
        weights = eqx.tree_at(lambda n: n.toy.mix, network, network.toy.mix.at[1, 2].add(t[1]))
        conditioning = stack_conditions(text.at[3].add(t[0]), jnp.zeros_like(text))
        predict = Guided(weights, conditioning, ClassifierFree(3 + t[2]))
        rows = eqx.tree_at(lambda s: s.sigma, schedule, schedule.sigma.at[2].add(t[3]))
        return jnp.sum(sample(Denoiser(predict, Flow()), x, rows, solver, remat=remat) ** 2)

    loss = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss))(jnp.zeros(4))
    for k in range(4):
        h = jnp.zeros(4).at[k].set(1e-4)
        central = (loss(h) - loss(-h)) * 2 / 3 / 1e-4 - (loss(2 * h) - loss(-2 * h)) / 12 / 1e-4
        assert float(gradient[k]) == pytest.approx(float(central), rel=1e-6)


def test_half_precision_noise_is_sampled_in_float32():
    x = sample(DENOISER, noise().astype(jnp.bfloat16), flow_schedule(2), Euler())
    assert x.dtype == jnp.float32
