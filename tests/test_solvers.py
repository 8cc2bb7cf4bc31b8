import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_tensor, relative_error
from toy import SIZE, Gaussian, Toy, noise, reference

from eqxdiff.sampling import (
    Denoiser,
    Euler,
    Flow,
    Heun,
    Schedule,
    flow_schedule,
    flow_sigmas,
    parse_flow_config,
    sample,
    start,
)


def test_euler_on_a_flow_is_diffusers():
    config = parse_flow_config({"use_dynamic_shifting": True}, name="scheduler_config.json")
    schedule = flow_sigmas(config, 28, sequence_length=1024)
    x = sample(Denoiser(Toy.init(), Flow()), noise(), schedule, Euler())
    assert relative_error(x, reference()["trajectory/flow/euler"][-1]) < 2e-6


def test_heun_on_a_flow_is_diffusers():
    sigma = reference()["sigmas/flow/heun"]
    schedule = Schedule.init(1 - sigma, sigma, 1000 * sigma)
    x = sample(Denoiser(Toy.init(), Flow()), noise(), schedule, Heun(straight=True))
    assert relative_error(x, reference()["trajectory/flow/heun"][-1]) < 2e-6


def gaussian(dtype=np.float64):
    mean = jnp.asarray(fake_tensor("mean", (SIZE,), 1.0).astype(dtype)) * 5
    return Gaussian(mean, jnp.linspace(0.2, 1.5, SIZE, dtype=dtype))


def curve(steps, kind):
    """Smooth rows from almost pure noise to a little noise, in float64."""
    u = np.linspace(0.98, 0.02, steps + 1)
    alpha, sigma = (1 - u, u) if kind == "flow" else (np.cos(u * np.pi / 2), np.sin(u * np.pi / 2))
    rows = [jnp.asarray(v) for v in (alpha, sigma, 1000 * u)]
    return Schedule(*rows, jnp.asarray(1.0))


ORDERS = {
    "euler": (Euler(), 1),
    "heun": (Heun(), 2),
    "heun straight": (Heun(straight=True), 2),
}


@pytest.mark.parametrize("kind", ["flow", "preserving"])
@pytest.mark.parametrize("name", ORDERS)
def test_solvers_converge_to_the_exact_flow_of_a_gaussian_at_their_order(x64, name, kind):
    solver, order = ORDERS[name]
    denoiser = gaussian()
    x = jnp.asarray(np.asarray(noise(), np.float64))

    def error(steps):
        schedule = curve(steps, kind)
        exact = denoiser.flow(x, schedule[0], schedule[-1])
        return relative_error(sample(denoiser, x, schedule, solver), exact)

    errors = [error(steps) for steps in (64, 128, 256)]
    measured = np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])
    assert np.allclose(measured, order, atol=0.15), (measured, errors)
    assert errors[-1] < 10 ** (-1.5 * order)


def point():
    """All data in one point: x0 is constant, and every solver is exact in any number of steps."""
    return Gaussian(noise() / 3, jnp.zeros(SIZE))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ORDERS)
def test_solvers_are_exact_on_a_point_from_pure_noise(name, steps):
    """From alpha 0, so that zero terminal SNR is covered, to sigma 0."""
    schedule = flow_schedule(steps)
    x = sample(point(), start(noise(), schedule), schedule, ORDERS[name][0])
    np.testing.assert_allclose(x, noise() / 3, rtol=1e-5, atol=1e-6)
