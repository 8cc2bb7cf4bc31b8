import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_tensor
from toy import SIZE, Toy, noise

from eqxdiff._errors import SettingError
from eqxdiff.sampling import (
    ClassifierFree,
    Conditioned,
    Denoiser,
    Euler,
    Flow,
    Guided,
    GuidedDenoiser,
    Interval,
    Row,
    Unguided,
    classifier_free,
    flow_schedule,
    sample,
    stack_conditions,
)


class Conditioning(eqx.Module):
    text: jax.Array
    name: str = eqx.field(static=True, default="text")


class Network(eqx.Module):
    toy: Toy

    def __call__(self, x, row, conditioning):
        return self.toy(x + conditioning.text, row)


NETWORK = Network(Toy.init())
WANTED = Conditioning(jnp.asarray(fake_tensor("wanted", (SIZE,))))
UNWANTED = Conditioning(jnp.asarray(fake_tensor("unwanted", (SIZE,))))
ROW = flow_schedule(4)[1]


@pytest.mark.parametrize("sequential", [False, True])
def test_guidance_extrapolates_from_the_unconditional_to_the_conditional(sequential):
    conditioning = stack_conditions(WANTED, UNWANTED)
    guider = ClassifierFree(jnp.asarray(3.0), sequential=sequential)
    guided = Guided(NETWORK, conditioning, guider)
    c, u = (Conditioned(NETWORK, both)(noise(), ROW) for both in (WANTED, UNWANTED))
    np.testing.assert_allclose(guided(noise(), ROW), u + 3 * (c - u), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "which"), [(1.0, WANTED), (0.0, UNWANTED)])
def test_scale_one_is_the_conditional_and_zero_the_unconditional(scale, which):
    guider = ClassifierFree(jnp.asarray(scale))
    guided = Guided(NETWORK, stack_conditions(WANTED, UNWANTED), guider)
    alone = Conditioned(NETWORK, which)(noise(), ROW)
    np.testing.assert_allclose(guided(noise(), ROW), alone, rtol=1e-5, atol=1e-6)


def test_rescaling_restores_the_deviation_of_the_conditional():
    c, u = jnp.asarray(fake_tensor("c", (4, 4, 2))), jnp.asarray(fake_tensor("u", (4, 4, 2)))
    full = classifier_free(c, u, jnp.asarray(7.5), jnp.asarray(1.0))
    assert float(jnp.std(full)) == pytest.approx(float(jnp.std(c)), rel=1e-5)
    plain = classifier_free(c, u, jnp.asarray(7.5))
    none = classifier_free(c, u, jnp.asarray(7.5), jnp.asarray(0.0))
    np.testing.assert_allclose(none, plain, rtol=1e-6)
    partly = classifier_free(c, u, jnp.asarray(7.5), jnp.asarray(0.7))
    np.testing.assert_allclose(partly, 0.7 * full + 0.3 * plain, rtol=1e-4, atol=1e-6)


def test_outputs_of_half_precision_are_combined_in_float32():
    c = jnp.asarray(fake_tensor("c", (8,))).astype(jnp.bfloat16)
    assert classifier_free(c, c, jnp.asarray(7.5)).dtype == jnp.float32


def test_a_denoiser_is_a_pytree_that_reads_the_data_off_the_prediction():
    denoiser = Denoiser(Conditioned(NETWORK, WANTED), Flow())
    x0 = eqx.filter_jit(lambda d, x: d(x, ROW))(denoiser, noise())
    v = NETWORK(noise(), ROW, WANTED)
    np.testing.assert_allclose(x0, noise() - ROW.sigma * v, rtol=1e-5, atol=1e-6)


# Intervals.


def test_guidance_in_an_interval_is_the_scale_there_and_one_elsewhere():
    """Step by step against hand computing, and many intervals in one program."""
    schedule = flow_schedule(8)
    conditions = stack_conditions(WANTED, UNWANTED)

    def by_hand(acts):
        x = noise()
        for index in range(8):
            row = schedule[index]
            c, u = (Conditioned(NETWORK, both)(x, row) for both in (WANTED, UNWANTED))
            output = u + (3.0 if index in acts else 1.0) * (c - u)
            x = x + (schedule.sigma[index + 1] - row.sigma) * output
        return x

    @eqx.filter_jit
    @jax.vmap
    def run(interval):
        guider = ClassifierFree(jnp.asarray(3.0), interval=interval)
        denoiser = GuidedDenoiser(NETWORK, conditions, guider, Flow())
        return sample(denoiser, noise(), schedule, Euler())

    parts = {(0.0, 1.0): range(8), (0.25, 0.75): range(2, 6), (0.0, 0.3): range(2)}
    intervals = [Interval.over(schedule, *ends, name="Guidance") for ends in parts]
    found = run(jax.tree.map(lambda *leaves: jnp.stack(leaves), *intervals))
    for x, acts in zip(found, parts.values(), strict=True):
        np.testing.assert_allclose(x, by_hand(acts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 3])
def test_an_interval_is_parts_of_the_steps_that_are_taken(first):
    schedule = flow_schedule(8 + first).since(first)
    interval = Interval.over(schedule, 0.5, 1.0, name="Guidance")
    acts = [bool(interval.contains(schedule[index])) for index in range(8)]
    assert acts == [False] * 4 + [True] * 4
    whole = Interval.over(schedule, 0.0, 1.0, name="Guidance")
    ends = [flow_schedule(1)[0], Row(*map(jnp.asarray, (1.0, 0.0, 0.0)))]
    assert all(whole.contains(row) for row in ends), "at every level, that of a second look, too"


def test_an_interval_without_a_step_is_an_error():
    with pytest.raises(SettingError, match=r"Guidance that acts from 0.5 to 0.6 .* none of 8 st"):
        Interval.over(flow_schedule(8), 0.5, 0.6, name="Guidance")


# Guiders.


def test_without_guidance_the_network_sees_the_prompt_alone():
    calls = []

    def network(x, row, condition):
        calls.append(1)
        return NETWORK(x, row, condition)

    alone = Guided(network, stack_conditions(WANTED), Unguided())(noise(), ROW)
    assert len(calls) == 1
    np.testing.assert_array_equal(alone, Conditioned(NETWORK, WANTED)(noise(), ROW))


def test_a_guided_denoiser_reads_the_data_off_the_guided_output():
    conditions, guider = stack_conditions(WANTED, UNWANTED), ClassifierFree(jnp.asarray(3.0))
    x0 = GuidedDenoiser(NETWORK, conditions, guider, Flow())(noise(), ROW)
    output = Guided(NETWORK, conditions, guider)(noise(), ROW)
    np.testing.assert_allclose(x0, noise() - ROW.sigma * output, rtol=1e-5, atol=1e-6)


def test_guidance_maps_over_scales_rescaling_conditions_and_schedules():
    def run(scale, text, shift):
        condition = Conditioning(text)
        conditions = stack_conditions(condition, UNWANTED)
        guider = ClassifierFree(scale, scale / 10)
        denoiser = GuidedDenoiser(NETWORK, conditions, guider, Flow())
        schedule = flow_schedule(3)
        schedule = eqx.tree_at(lambda s: s.sigma, schedule, schedule.sigma * shift)
        return sample(denoiser, noise(), schedule, Euler())

    rows = jnp.asarray([1.0, 4.0]), jnp.stack([WANTED.text, UNWANTED.text]), jnp.asarray([1, 0.9])
    mapped = jax.vmap(run)(*rows)
    for k in range(2):
        alone = run(*(row[k] for row in rows))
        np.testing.assert_allclose(mapped[k], alone, rtol=1e-5, atol=1e-5)
