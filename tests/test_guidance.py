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
    Flow,
    Guided,
    classifier_free,
    flow_schedule,
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
