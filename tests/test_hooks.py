"""Memory that a guider carries from step to step, and hooks between steps."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_tensor, relative_error
from toy import SIZE, Gaussian, Toy, noise

from eqxdiff.sampling import (
    AbstractGuider,
    Blend,
    Denoiser,
    DPMpp2M,
    Euler,
    Flow,
    GuidedDenoiser,
    Heun,
    Hook,
    Schedule,
    Unguided,
    UniPC,
    add_noise,
    begin,
    flow_schedule,
    sample,
    stack_conditions,
    step,
)


TEXT = jnp.asarray(fake_tensor("text", (SIZE,)))


class Network(eqx.Module):
    toy: Toy

    def __call__(self, x, row, text):
        return self.toy(x + text, row)


class Alternate(AbstractGuider):
    """Calls the network in every second step and says the same again in the others."""

    roles: ClassVar[tuple[str, ...]] = ("prompt",)

    def init(self, x):
        return jnp.zeros((), jnp.int32), jnp.zeros_like(x)

    def __call__(self, predict, conditions, x, row, memory):
        count, kept = memory
        fresh = lambda: Unguided()(predict, conditions, x, row, None)[0]
        output = jax.lax.cond(count % 2 == 0, fresh, lambda: kept)
        return output, (count + 1, output)


def caching():
    return GuidedDenoiser(Network(Toy.init()), stack_conditions(TEXT), Alternate(), Flow())


def denoiser():
    return GuidedDenoiser(Network(Toy.init()), stack_conditions(TEXT), Unguided(), Flow())


def test_a_guider_remembers_from_step_to_step():
    """A step cache is Euler's method with half the calls of the network."""
    schedule = flow_schedule(6)
    network, x, output = Network(Toy.init()), noise(), TEXT
    for index in range(6):
        if index % 2 == 0:
            output = network(x, schedule[index], TEXT)
        x = x + (schedule.sigma[index + 1] - schedule.sigma[index]) * output
    found = eqx.filter_jit(sample)(caching(), noise(), schedule, Euler())
    assert relative_error(found, x) < 1e-5
    plain = sample(denoiser(), noise(), schedule, Euler())
    assert relative_error(found, plain) > 1e-3


def test_further_evaluations_of_a_step_read_the_memory_and_leave_it():
    """Heun evaluates twice a step; the memory counts one."""
    schedule, x, x0 = flow_schedule(4), noise(), noise()
    state = begin(caching(), x, schedule, Heun(straight=True))
    for index in range(4):
        before = state.memory
        x, x0, state = step(caching(), x, state, schedule, index, Heun(straight=True))
        assert int(state.memory[0]) == int(before[0]) + 1
        if index % 2:
            np.testing.assert_array_equal(state.memory[1], before[1])
    assert np.isfinite(x0).all()


def test_a_step_returns_the_data_that_it_started_with():
    schedule = flow_schedule(4)
    row, hook = schedule[0], Hook(on_x0=lambda x0, x, row, denoise: 2 * x0)
    state = begin(denoiser(), noise(), schedule, Euler())
    _, x0, _ = step(denoiser(), noise(), state, schedule, 0, Euler())
    np.testing.assert_allclose(x0, denoiser()(noise(), row), rtol=1e-6)
    _, doubled, _ = step(denoiser(), noise(), state, schedule, 0, Euler(), hooks=[hook])
    np.testing.assert_array_equal(doubled, 2 * x0)


class Towards(eqx.Module):
    """An `on_x0` with arrays of its own."""

    target: jax.Array
    amount: jax.Array

    def __call__(self, x0, x, row, denoise):
        return x0 + self.amount * (self.target - x0)


def test_hooks_apply_in_order_after_every_evaluation():
    """In a scan, with a solver that evaluates twice, and as the wrapped denoiser would."""

    def double(x0, x, row, denoise):
        return 2 * x0

    towards = Towards(TEXT, jnp.asarray(0.3))
    hooks = [Hook(on_x0=double), Hook(on_x0=towards)]
    by_hand = lambda x, row: towards(2 * denoiser()(x, row), x, row, None)
    for solver in (Euler(), Heun(straight=True), DPMpp2M()):
        found = sample(denoiser(), noise(), flow_schedule(5), solver, hooks=hooks)
        expected = sample(by_hand, noise(), flow_schedule(5), solver)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        swapped = sample(denoiser(), noise(), flow_schedule(5), solver, hooks=hooks[::-1])
        assert relative_error(swapped, expected) > 1e-2


def test_a_hook_on_x_sees_where_the_step_has_ended():
    schedule, seen = flow_schedule(3), []

    def look(x, x0, moment):
        values = (moment.row.sigma, moment.to.sigma, moment.last)
        seen.append((int(moment.index), *map(float, values)))
        return x

    with jax.disable_jit():
        sample(denoiser(), noise(), schedule, Euler(), hooks=[Hook(on_x=look)])
    sigma = [float(v) for v in schedule.sigma]
    assert seen == [(i, sigma[i], sigma[i + 1], float(i == 2)) for i in range(3)]


def test_other_arrays_in_hooks_and_memory_do_not_compile_again():
    compiles = []

    @eqx.filter_jit
    def run(denoiser, x, schedule, hooks):
        compiles.append(1)
        return sample(denoiser, x, schedule, Euler(), hooks=hooks)

    def hooks(scale):
        blend = Blend(jnp.full(SIZE, 0.5 * scale), TEXT * scale, noise())
        return [Hook(Towards(TEXT * scale, jnp.asarray(0.1 * scale)), blend)]

    one = run(caching(), noise(), flow_schedule(4), hooks(1.0))
    two = run(caching(), 2 * noise(), flow_schedule(4, shift=2.0), hooks(2.0))
    assert len(compiles) == 1
    assert relative_error(one, two) > 0.01


def test_hooks_and_memory_map_over_their_arrays():
    scales = jnp.asarray([0.2, 0.9])

    def run(scale, shift):
        schedule = eqx.tree_at(lambda s: s.start, flow_schedule(4), shift)
        blend = Blend(jnp.broadcast_to(scale, SIZE), TEXT, noise())
        hooks = [Hook(Towards(TEXT * scale, scale), blend)]
        return sample(caching(), schedule.start * noise(), schedule, Euler(), hooks=hooks)

    mapped = jax.vmap(run)(scales, scales)
    for k in range(2):
        alone = run(scales[k], scales[k])
        np.testing.assert_allclose(mapped[k], alone, rtol=1e-5, atol=1e-6)


def test_posterior_sampling_moves_the_sample_to_a_measurement():
    """Diffusion posterior sampling (https://arxiv.org/abs/2209.14687) in three lines."""
    prior = Gaussian(jnp.zeros(SIZE), jnp.ones(SIZE))
    operator = jnp.asarray(fake_tensor("operator", (3, SIZE)))
    measured = operator @ jnp.asarray(fake_tensor("truth", (SIZE,))) * 5

    def misfit(x, row, denoise):
        return jnp.sum((operator @ denoise(x, row) - measured) ** 2)

    def towards_measurement(x0, x, row, denoise):
        return x0 - jax.grad(misfit)(x, row, denoise)

    run = lambda hooks: sample(prior, noise(), flow_schedule(50), Euler(), hooks=hooks)
    off = lambda x: float(jnp.linalg.norm(operator @ x - measured) / jnp.linalg.norm(measured))
    assert off(run([])) > 1.0
    assert off(run([Hook(on_x0=towards_measurement)])) < 0.2


def test_gradients_flow_through_a_hooked_sample(x64):
    wide = lambda a: jnp.asarray(np.asarray(a, np.float64))
    model = jax.tree.map(wide, denoiser())
    schedule = jax.tree.map(wide, flow_schedule(4))
    text, x = wide(TEXT), wide(noise())

    def loss(scale):
        hooks = [Hook(Towards(text, scale), Blend(scale, text, x))]
        return jnp.sum(sample(model, x, schedule, Heun(True), hooks=hooks) ** 2)

    loss = jax.jit(loss)
    gradient, h = jax.grad(loss)(jnp.asarray(0.4)), 1e-5
    central = (loss(0.4 + h) - loss(0.4 - h)) / (2 * h)
    assert float(gradient) == pytest.approx(float(central), rel=1e-6)


@pytest.mark.parametrize("solver", [Euler(), DPMpp2M(), UniPC()])
def test_blending_keeps_a_part_and_repaints_the_rest(solver):
    """Kept rows are the picture with the step's noise, and at last the picture itself."""
    clean = jnp.asarray(fake_tensor("clean", (4, 3, 2)))
    unit = jnp.asarray(fake_tensor("unit", (4, 3, 2))) * 5
    mask = jnp.zeros((4, 3, 1)).at[2:].set(1.0)
    mean = jnp.asarray(fake_tensor("mean", (4, 3, 2)))
    model = Gaussian(mean, jnp.full((4, 3, 2), 0.1))
    schedule, hook = flow_schedule(8), Hook(on_x=Blend(mask, clean, unit))
    x, state = unit, begin(model, unit, schedule, solver)
    for index in range(8):
        x, _, state = step(model, x, state, schedule, index, solver, hooks=[hook])
        if index < 7:
            kept = add_noise(clean, unit, schedule[index + 1])
            np.testing.assert_allclose(x[:2], kept[:2], rtol=1e-6)
    np.testing.assert_array_equal(x[:2], clean[:2])
    free = sample(model, unit, schedule, solver)
    np.testing.assert_allclose(x[2:], free[2:], rtol=1e-4, atol=1e-5)
    half = sample(model, unit, schedule, solver, hooks=[Hook(on_x=Blend(mask / 2, clean, unit))])
    assert relative_error(half[2:], free[2:]) > 0.01


@pytest.mark.parametrize("solver", [Euler(), Heun(), DPMpp2M(), UniPC()])
def test_a_solver_carries_on_what_a_hook_makes_of_x(solver):
    """With the data in one point a solver is exact, from wherever a hook puts x. (PNDM and LMS look
    back at slopes, which were those of another x.)"""
    point = Gaussian(TEXT, jnp.zeros(SIZE))
    sigma = np.linspace(0.9, 0.3, 7)
    schedule = Schedule.init(np.sqrt(1 - sigma**2), sigma, 1000 * sigma)
    move = lambda x, x0, moment: jnp.where(moment.index == 3, x + 1, x)
    free = sample(point, noise(), schedule, solver)
    moved = sample(point, noise(), schedule, solver, hooks=[Hook(on_x=move)])
    np.testing.assert_allclose(moved - free, sigma[-1] / sigma[4], rtol=1e-4)


def test_a_plain_function_is_a_denoiser():
    model = Denoiser(Toy.init(), Flow())
    plain = sample(lambda x, row: model(x, row), noise(), flow_schedule(3), Euler())
    np.testing.assert_array_equal(plain, sample(model, noise(), flow_schedule(3), Euler()))
