import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_tensor

from eqxdiff.sampling import X0, Epsilon, Flow, Schedule, VPrediction, add_noise


ALL = {"epsilon": Epsilon(), "v": VPrediction(), "x0": X0(), "flow": Flow()}


@pytest.fixture
def data():
    return jnp.asarray(fake_tensor("x0", (8,))), jnp.asarray(fake_tensor("eps", (8,)))


def row(name, sigma):
    alpha = 1 - sigma if name == "flow" else np.sqrt(1 - sigma**2)
    return Schedule.init([alpha, 1], [sigma, 0], [1000 * sigma, 0])[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sigma", [0.01, 0.5, 0.99])
def test_the_target_of_training_denoises_to_the_data(name, sigma, data):
    x0, eps = data
    level = row(name, sigma)
    output = ALL[name].target(x0, eps, level)
    denoised = ALL[name].denoised(add_noise(x0, eps, level), output, level)
    np.testing.assert_allclose(denoised, x0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_pure_noise_is_no_special_case(name, data):
    """At alpha 0 all but epsilon still find the data; epsilon gives 0; no gradient is NaN."""
    x0, eps = data
    level = row(name, 1.0)
    output = ALL[name].target(x0, eps, level)
    x = add_noise(x0, eps, level)
    found = ALL[name].denoised(x, output, level)
    np.testing.assert_allclose(found, jnp.zeros(8) if name == "epsilon" else x0, atol=1e-6)
    gradient = jax.grad(lambda x: ALL[name].denoised(x, output, level).sum())(x)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ALL)
def test_a_narrow_output_is_widened_to_x(name, data):
    x0, eps = data
    output = ALL[name].target(x0, eps, row(name, 0.5)).astype(jnp.bfloat16)
    assert ALL[name].denoised(x0, output, row(name, 0.5)).dtype == jnp.float32


def test_float64_stays(x64, data):
    x = jnp.asarray(np.asarray(data[0], np.float64))
    for parameterization in ALL.values():
        assert parameterization.denoised(x, x, row("x0", 0.5)).dtype == jnp.float64


def test_velocities_have_their_signs(data):
    x0, eps = data
    level = row("v", 0.6)
    np.testing.assert_allclose(
        VPrediction().target(x0, eps, level), 0.8 * eps - 0.6 * x0, rtol=1e-5
    )
    np.testing.assert_allclose(Flow().target(x0, eps, level), eps - x0)
