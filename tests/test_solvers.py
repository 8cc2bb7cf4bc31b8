import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_tensor, relative_error
from sampler_cases import DISCRETE
from toy import SIZE, Gaussian, Toy, noise, reference

from eqxdiff._errors import SettingError
from eqxdiff.sampling import (
    DDIM,
    DDPM,
    LCM,
    LMS,
    PNDM,
    SAMPLERS,
    TCD,
    Denoiser,
    DPMpp2M,
    DPMpp2MSDE,
    DPMppSDE,
    Epsilon,
    Euler,
    EulerAncestral,
    Flow,
    Heun,
    Interval,
    Row,
    Schedule,
    StochasticDDIM,
    UniPC,
    VPrediction,
    add_noise,
    begin,
    default_sampler,
    discrete_schedule,
    find_sampler,
    flow_schedule,
    flow_sigmas,
    noise_levels,
    parameterization_of,
    parse_discrete_config,
    parse_flow_config,
    sample,
    start,
    step,
)
from eqxdiff.sampling.solvers._base import transfer
from eqxdiff.sampling.solvers.unipc import _moments


# Agreement with diffusers, whole trajectories.


jitted = eqx.filter_jit(step)
whole = eqx.filter_jit(sample)


def trajectory(denoiser, x, schedule, solver, key=None):
    """x at every row."""
    rows, state = [x], begin(denoiser, x, schedule, solver)
    for index in range(schedule.steps):
        x, _, state = jitted(denoiser, x, state, schedule, jnp.asarray(index), solver, key)
        rows.append(x)
    return rows


def recorded_noise(steps):
    names = [[f"noise/{step}/{draw}" for draw in (0, 1)] for step in range(steps)]
    return jnp.asarray([[fake_tensor(name, (SIZE,)) * 5 for name in row] for row in names])


@pytest.mark.parametrize("name", DISCRETE)
def test_samplers_of_ddpms_agree_with_diffusers(name):
    """From the json to the last row, with the same noise, in the variance preserving scale."""
    scheduler, fields, steps, arguments = DISCRETE[name]
    config = parse_discrete_config({"_class_name": scheduler, **fields}, name="config")
    sampler = default_sampler(config)
    assert sampler.name == name.split("/")[0]
    parameterization = parameterization_of(config.prediction_type)
    eta = arguments.get("eta") if sampler.name == "ddim" else None
    gamma = {"gamma": arguments["eta"]} if sampler.name == "tcd" and arguments else {}
    schedule = discrete_schedule(config, steps, sampler.grid, **gamma)
    np.testing.assert_allclose(
        schedule.timestep[:-1], reference()[f"timesteps/{name}"], atol=2e-4, rtol=1e-6
    )
    rows = trajectory(
        Denoiser(Toy.init(), parameterization),
        start(noise(), schedule),
        schedule,
        sampler.solver_for(parameterization, eta=eta),
        recorded_noise(steps),
    )
    # The reference's own float32 loses digits where sigma / alpha is 4096.
    bound = 2e-5 if "zero snr" in name else 2e-6
    for row, recorded in zip(rows, reference()[f"discrete/{name}"], strict=True):
        assert relative_error(row, recorded) < bound


def test_euler_on_a_flow_is_diffusers():
    config = parse_flow_config({"use_dynamic_shifting": True}, name="scheduler_config.json")
    schedule = flow_sigmas(config, 28, sequence_length=1024)
    rows = trajectory(Denoiser(Toy.init(), Flow()), noise(), schedule, Euler())
    for row, recorded in zip(rows, reference()["trajectory/flow/euler"], strict=True):
        assert relative_error(row, recorded) < 2e-6


def test_heun_on_a_flow_is_diffusers():
    sigma = reference()["sigmas/flow/heun"]
    schedule = Schedule.init(1 - sigma, sigma, 1000 * sigma)
    x = sample(Denoiser(Toy.init(), Flow()), noise(), schedule, Heun(straight=True))
    assert relative_error(x, reference()["trajectory/flow/heun"][-1]) < 2e-6


# Exactness and order on a Gaussian, whose denoiser and flow are known.


def gaussian():
    mean = jnp.asarray(fake_tensor("mean", (SIZE,)).astype(np.float64)) * 5
    return Gaussian(mean, jnp.linspace(0.2, 1.5, SIZE, dtype=np.float64))


def curve(steps, kind="preserving", eased=False):
    """Smooth rows from much noise to little, in float64. Eased, the first step and the last are
    cut into ever smaller ones, so that what a solver does there for want of a past is lost."""

    def rows(u):
        pairs = {"flow": (1 - u, u), "preserving": (np.cos(u * np.pi / 2), np.sin(u * np.pi / 2))}
        alpha, sigma = map(jnp.asarray, pairs[kind])
        return alpha, sigma, jnp.asarray(1000 * u)

    u = np.linspace(0.85, 0.15, steps + 1)
    if eased:
        cuts = (u[0] - u[1]) * 2.0 ** -np.arange(18, 0, -1)
        u = np.concatenate([u[:1], u[0] - cuts, u[1:-1], u[-1] + cuts[::-1], u[-1:]])
    return Schedule(*rows(u), jnp.asarray(1.0), Row(*rows((u[:-1] + u[1:]) / 2)))


def error_on_a_gaussian(solver, schedule):
    denoiser, x = gaussian(), jnp.asarray(np.asarray(noise(), np.float64))
    exact = denoiser.flow(x, schedule[0], schedule[-1])
    found = whole(denoiser, x, schedule, solver)
    assert found.dtype == jnp.float64
    return relative_error(found, exact)


ORDERS = {
    "euler": (Euler(), 1),
    "heun": (Heun(), 2),
    "heun straight": (Heun(straight=True), 2),
    "ddim": (DDIM(), 1),
    "dpmpp 2m": (DPMpp2M(), 2),
    "unipc": (UniPC(), 2),
    "pndm": (PNDM(), 2),
    "lms": (LMS(), 2),
    "lms straight": (LMS(straight=True), 2),
    "lms order 2": (LMS(straight=True, order=2), 2),
}
INNER_ORDERS = {
    "dpmpp 2m": (DPMpp2M(), 2),
    "unipc": (UniPC(), 3),
    "lms": (LMS(), 4),
    "lms straight": (LMS(straight=True), 4),
    "lms order 3": (LMS(order=3), 3),
    "lms order 2": (LMS(straight=True, order=2), 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_solvers_converge_to_the_exact_flow_of_a_gaussian_at_their_order(x64, name):
    """Multistep methods have no past at first, which limits them to order 2."""
    solver, order = ORDERS[name]
    for kind in ("flow", "preserving"):
        errors = [error_on_a_gaussian(solver, curve(steps, kind)) for steps in (64, 128)]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2), (kind, errors)


@pytest.mark.parametrize("name", INNER_ORDERS)
def test_multistep_methods_have_their_order_once_they_have_a_past(x64, name):
    solver, order = INNER_ORDERS[name]
    for kind in ("flow", "preserving"):
        curves = [curve(steps, kind, eased=True) for steps in (64, 128)]
        errors = [error_on_a_gaussian(solver, schedule) for schedule in curves]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35), (kind, errors)


STOCHASTIC = {
    "ddpm": (DDPM(), 1, 1),
    "euler ancestral": (EulerAncestral(), 1, 1),
    "ddim eta": (StochasticDDIM(jnp.asarray(0.5)), 1, 1),
    "dpmpp 2m sde": (DPMpp2MSDE(), 1, 2),
    "dpmpp sde": (DPMppSDE(), 2, 2),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_converge_to_the_distribution_of_a_gaussian(x64, name):
    """On a Gaussian a step is affine in x and the noise, so that mean and variance follow exactly
    from derivatives, and no draws are needed."""
    solver, draws, order = STOCHASTIC[name]
    denoiser = gaussian()

    def errors(steps):
        schedule = curve(steps)
        first, last = schedule[0], schedule[-1]

        def run(x, noise):
            return sample(denoiser, x, schedule, solver, key=noise)

        def variance(row):
            return (row.alpha * denoiser.deviation) ** 2 + row.sigma**2

        zeros = jnp.zeros((steps, draws, SIZE))
        mean, pull = jax.vjp(run, first.alpha * denoiser.mean, zeros)
        by_x, by_noise = pull(jnp.ones(SIZE))  # everything is elementwise
        found = by_x**2 * variance(first) + jnp.sum(by_noise**2, axis=(0, 1))
        return (
            relative_error(mean, last.alpha * denoiser.mean),
            relative_error(found, variance(last)),
        )

    (mean64, spread64), (mean128, spread128) = errors(64), errors(128)
    assert max(mean64, mean128) < 1e-10, "the mean is exact in any number of steps"
    assert np.log2(spread64 / spread128) == pytest.approx(order, abs=0.2)


def point():
    """All data in one point: x0 is constant, and every solver is exact in any number of steps."""
    return Gaussian(noise() / 3, jnp.zeros(SIZE))


def ends(steps):
    """From alpha 0 to sigma 0, with rows within the steps."""
    schedule = flow_schedule(steps)
    rows = schedule.alpha, schedule.sigma, schedule.timestep
    return eqx.tree_at(
        lambda s: s.middle, schedule, Row(*(v[:-1] for v in rows)), is_leaf=lambda x: x is None
    )


EVERY = {
    **{name: solver for name, (solver, _) in ORDERS.items()},
    **{name: solver for name, (solver, _, _) in STOCHASTIC.items()},
    "lcm": LCM(),
    "tcd": TCD(),
}
# Slopes against sigma / alpha, and noise along it, have no start at alpha 0.
FROM_PURE_NOISE = set(EVERY) - {"pndm", "dpmpp sde", "tcd"}


@eqx.filter_jit
def step_and_gradient(x, state, schedule, index, solver):
    """A step, and the gradient of all that comes of it in x, the state and the schedule."""

    def total(arguments):
        x, state, schedule = arguments
        out = step(point(), x, state, schedule, index, solver, jax.random.key(0))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out)), out

    return jax.grad(total, has_aux=True)((x, state, schedule))


@pytest.mark.parametrize("name", sorted(FROM_PURE_NOISE))
def test_solvers_are_exact_on_a_point_from_pure_noise(name):
    """Zero terminal SNR is no special case, nor is the end at no noise; no gradient is NaN."""
    schedule, solver = ends(4), EVERY[name]
    x, state = noise(), begin(point(), noise(), schedule, solver)
    for index in range(4):
        gradient, (x, _, state) = step_and_gradient(x, state, schedule, jnp.asarray(index), solver)
        if not solver.requires_key:  # new noise has a root in it, whose argument is 0 at the ends
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(x, noise() / 3, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", sorted(FROM_PURE_NOISE))
def test_one_step_is_enough_for_a_point(name):
    with jax.disable_jit():
        x = sample(point(), noise(), ends(1), EVERY[name], key=jax.random.key(0))
    np.testing.assert_allclose(x, noise() / 3, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_solvers_are_exact_on_a_point_of_a_checkpoints_schedule(name):
    config = parse_discrete_config({"_class_name": "TCDScheduler"}, name="config")
    grid = find_sampler("tcd").grid
    schedule = discrete_schedule(config, 6, grid, gamma=0.0)
    with jax.disable_jit():
        x = sample(point(), noise(), schedule, EVERY[name], key=jax.random.key(0))
    left = (x - schedule[-1].alpha * noise() / 3) / schedule[-1].sigma
    if EVERY[name].requires_key and name != "tcd":  # what is left is noise of unit variance
        assert 0.4 < float(jnp.std(left)) < 1.6
    else:  # what is left is the noise of the start
        before = (noise() - schedule[0].alpha * noise() / 3) / schedule[0].sigma
        np.testing.assert_allclose(left, before, rtol=1e-3, atol=1e-3)


def test_consistency_sampling_is_exact_with_a_consistent_denoiser(x64):
    """With the exact end of each trajectory for x0, LCM has the exact distribution at every row."""
    truth, schedule = gaussian(), curve(5)
    clean = Schedule.init([1, 1], [0, 0], [0, 0])[0]
    first, last = schedule[0], schedule[-1]

    def run(x, noise):
        return sample(lambda x, row: truth.flow(x, row, clean), x, schedule, LCM(), key=noise)

    mean, pull = jax.vjp(run, first.alpha * truth.mean, jnp.zeros((5, 1, SIZE)))
    by_x, by_noise = pull(jnp.ones(SIZE))
    spread = (first.alpha * truth.deviation) ** 2 + first.sigma**2
    found = by_x**2 * spread + jnp.sum(by_noise**2, axis=(0, 1))
    # The boundary condition mixes in x by 1e-5 at these timesteps.
    np.testing.assert_allclose(mean, last.alpha * truth.mean, rtol=1e-4)
    np.testing.assert_allclose(
        found, (last.alpha * truth.deviation) ** 2 + last.sigma**2, rtol=1e-4
    )


@pytest.mark.parametrize(("timestep", "skip", "out"), [(0.0, 1, 0), (0.1, 0.2, 0.8**0.5)])
def test_lcm_joins_the_network_to_x_at_timestep_0(timestep, skip, out):
    """By sigma_data 0.5 and timesteps scaled by 10."""
    schedule = Schedule.init([0.8, 1.0], [0.6, 0.0], [timestep, 0.0])
    x0 = noise() / 3
    x = sample(lambda x, row: x0, noise(), schedule, LCM(), key=jax.random.key(0))
    np.testing.assert_allclose(x, skip * noise() + out * x0, rtol=1e-5)


@pytest.mark.parametrize("h", [1e-4, 0.01, 0.3, 0.49, 0.51, 2.0, 8.0, 60.0])
def test_the_moments_of_unipc_are_integrals(h):
    u = (np.arange(100000) + 0.5) / 100000
    density = np.exp(h * (u - 1))
    found = _moments(jnp.asarray(h))
    for value, power in zip(found, (u, u**2), strict=True):
        assert float(value) == pytest.approx((power * density).sum() / density.sum(), rel=2e-6)


def test_trajectory_sampling_without_noise_is_ddim():
    config = parse_discrete_config({"_class_name": "TCDScheduler"}, name="config")
    schedule = discrete_schedule(config, 6, find_sampler("tcd").grid, gamma=0.0)
    denoiser, key = Denoiser(Toy.init(), VPrediction()), jax.random.key(0)
    tcd = sample(denoiser, noise(), schedule, TCD(), key=key)
    np.testing.assert_allclose(tcd, sample(denoiser, noise(), schedule, DDIM()), rtol=1e-5)


# Where diffusers does otherwise, on purpose.


def diffusers_plms(denoiser, x, schedule, *, of_v):
    """PNDM of diffusers on a schedule's rows: the formulas apply to v where a model predicts it."""
    weights = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24
    past = []
    for index in range(schedule.steps):
        at, to = schedule[index], schedule[index + 1]

        def output(x, row):
            eps = (x - row.alpha * denoiser(x, row)) / row.sigma
            return row.alpha * eps - row.sigma * denoiser(x, row) if of_v else eps

        def reach(combined, x=x, at=at, to=to):
            eps = at.alpha * combined + at.sigma * x if of_v else combined
            return transfer(x, (x - at.sigma * eps) / at.alpha, at, to)

        past = [output(x, at), *past][:4]
        if index == 0:
            x = reach((past[0] + output(reach(past[0]), to)) / 2)
        else:
            x = reach(sum(w * p for w, p in zip(weights[min(index, 3)], past, strict=False)))
    return x


def widened(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def test_pndm_is_of_second_order_for_models_of_v_and_diffusers_of_first(x64):
    denoiser, x = gaussian(), jnp.asarray(np.asarray(noise(), np.float64))
    orders = {}
    for of_v in (False, True):
        errors = []
        for steps in (32, 64):
            schedule = curve(steps)
            found = diffusers_plms(denoiser, x, schedule, of_v=of_v)
            errors.append(relative_error(found, denoiser.flow(x, schedule[0], schedule[-1])))
            if not of_v:
                assert relative_error(whole(denoiser, x, schedule, PNDM()), found) < 1e-9
        orders[of_v] = np.log2(errors[0] / errors[1])
    assert orders == {False: pytest.approx(2, abs=0.2), True: pytest.approx(1, abs=0.2)}


@pytest.mark.parametrize(
    ("spacing", "steps"), [("linspace", 3), ("linspace", 20), ("trailing", 7), ("trailing", 30)]
)
def test_a_step_ends_at_the_level_that_the_network_expects_next(spacing, steps):
    """DDIM of diffusers ends at the timestep `1000 // steps` below, with more noise or less."""
    fields = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    config = parse_discrete_config(
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": spacing, **fields}, name=""
    )
    schedule, data = discrete_schedule(config, steps, find_sampler("ddim").grid), noise() / 3
    levels, ours, theirs = noise_levels(config), [], []

    def expected(timestep):
        return Row(*(values[int(timestep)] for values in jax.tree.leaves(levels)))

    def amount(x, row):
        """How much of the noise that the network expects there is."""
        return float(jnp.std((x - row.alpha * data) / row.sigma))

    def denoise(x, row):
        ours.append(amount(x, expected(row.timestep)))
        return data

    x = add_noise(data, noise() / jnp.std(noise()), schedule[0])
    with jax.disable_jit():
        sample(denoise, x, schedule, DDIM())
    for timestep in map(int, schedule.timestep[:-1]):
        theirs.append(amount(x, expected(timestep)))
        x = transfer(x, data, expected(timestep), expected(max(timestep - 1000 // steps, 0)))
    np.testing.assert_allclose(ours, 1, rtol=2e-4)
    assert max(abs(np.array(theirs) - 1)) > 0.004


@pytest.mark.parametrize("steps", [3, 7])
def test_zero_snr_loses_no_digits_in_float32(x64, steps):
    """The exploding form, in which diffusers' Euler computes, loses some at sigma / alpha 4096."""
    fields = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    fields |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config = parse_discrete_config({"_class_name": "EulerDiscreteScheduler", **fields}, name="")
    schedule = discrete_schedule(config, steps, find_sampler("euler").grid)
    denoiser = Denoiser(Toy.init(), VPrediction())

    def exploding(x, schedule):
        z = x / schedule[0].alpha
        for index in range(steps):
            at, to = schedule[index], schedule[index + 1]
            slope = (z - denoiser(z * at.alpha, at)) / (at.sigma / at.alpha)
            z = z + slope * (to.sigma / to.alpha - at.sigma / at.alpha)
        return z

    x = start(noise(), schedule)
    exact = whole(denoiser, widened(x), widened(schedule), Euler())
    assert relative_error(exploding(widened(x), widened(schedule)), exact) < 1e-6
    assert relative_error(whole(denoiser, x, schedule, Euler()), exact) < 1e-6
    assert relative_error(exploding(x, schedule), exact) > 4e-6


def test_euler_hands_on_x_and_not_the_larger_exploding_form():
    config = parse_discrete_config(
        {"_class_name": "EulerDiscreteScheduler", **DISCRETE["euler/to the smallest"][1]}, name=""
    )
    last = discrete_schedule(config, 20, find_sampler("euler").grid)[-1]
    assert float(last.alpha**2 + last.sigma**2) == pytest.approx(1, rel=1e-6)
    assert float(1 / last.alpha) == pytest.approx(1.0004, abs=1e-4)


def test_an_interval_is_the_same_steps_with_pndm_as_with_any_solver():
    """diffusers counts calls of the network, of which PNDM has one more than steps."""
    config = parse_discrete_config({"_class_name": "EulerDiscreteScheduler"}, name="")
    acting = {}
    for name in ("pndm", "ddim"):
        schedule = discrete_schedule(config, 4, find_sampler(name).grid)
        interval, seen = Interval.over(schedule, 0.25, 0.75, name="Guidance"), []

        def denoise(x, row, interval=interval, seen=seen):
            seen.append((float(row.timestep), bool(interval.contains(row))))
            return x

        with jax.disable_jit():
            sample(denoise, noise(), schedule, find_sampler(name).solver)
        acting[name] = {timestep for timestep, acts in seen if acts}
        assert len(seen) == (5 if name == "pndm" else 4)
    assert acting["pndm"] == acting["ddim"] == {float(t) for t in schedule.timestep[1:3]}


def test_linear_multistep_of_a_flow_stands_steep_slopes():
    """Guidance makes the slopes of a flow steep, and the fourth order diverges there."""
    schedule, end = flow_schedule(20), noise() / 3

    def denoise(x, row):  # the slope is 10 (x - end)
        return x - row.sigma * 10 * (x - end)

    run = lambda solver: sample(denoise, noise(), schedule, solver)
    assert relative_error(run(find_sampler("lms").solver_for(Flow())), end) < 1e-3
    assert relative_error(run(Euler()), end) < 1e-3
    assert relative_error(run(LMS(straight=True)), end) > 1


# Noise, cost, dtypes.


@pytest.mark.parametrize("name", [name for name in EVERY if EVERY[name].requires_key])
def test_noise_depends_on_the_key_and_can_be_given(name):
    config = parse_discrete_config({"_class_name": "TCDScheduler"}, name="config")
    grid = find_sampler(name if name in ("tcd", "lcm") else "dpmpp-sde").grid
    schedule, solver = discrete_schedule(config, 4, grid), EVERY[name]
    denoiser = Denoiser(Toy.init(), VPrediction())
    keys = jax.random.key(0), jax.random.key(1)
    with pytest.raises(ValueError, match="key"):
        sample(denoiser, noise(), schedule, solver)
    one, other = (whole(denoiser, noise(), schedule, solver, key=key) for key in keys)
    assert relative_error(one, other) > 0.01
    # Draw j of step i is from fold_in(fold_in(key, i), j), and draw 0 from fold_in(key, i).
    folded = [jax.random.fold_in(keys[0], i) for i in range(4)]
    draws = [[key, jax.random.fold_in(key, 1)] for key in folded]
    given = jnp.stack([jnp.stack([jax.random.normal(k, (SIZE,)) for k in row]) for row in draws])
    np.testing.assert_allclose(
        sample(denoiser, noise(), schedule, solver, key=given), one, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_step_calls_the_network_as_often_as_it_says(name):
    """But for PNDM's first, and a last step to no noise."""
    calls = []

    def denoise(x, row):
        calls.append(1)
        return x

    schedule = jax.tree.map(lambda a: a.astype(jnp.float32), curve(3))
    with jax.disable_jit():
        sample(denoise, noise(), schedule, EVERY[name], key=jax.random.key(0))
    extra = 1 if name == "pndm" else 0
    assert len(calls) == 3 * EVERY[name].evaluations + extra


@pytest.mark.parametrize("name", [name for name in EVERY if EVERY[name].requires_key])
def test_float64_stays_float64_and_sees_the_same_noise(x64, name):
    wide = curve(4)
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32), wide)
    denoiser, key = Denoiser(Toy.init(), VPrediction()), jax.random.key(0)
    x = whole(denoiser, jnp.asarray(noise(), jnp.float64), wide, EVERY[name], key=key)
    assert x.dtype == jnp.float64
    assert relative_error(sample(denoiser, noise(), narrow, EVERY[name], key=key), x) < 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_no_solver_compiles_again_for_other_numbers(sampler):
    """Neither the index, the seed, the weights, eta, gamma nor the noise levels are compiled in."""
    compiles = []

    @eqx.filter_jit
    def run(denoiser, x, state, schedule, index, solver, key):
        compiles.append(1)
        return step(denoiser, x, state, schedule, index, solver, key)

    def steps(config, key, scale, **kwargs):
        schedule = discrete_schedule(config, 3, sampler.grid, **kwargs)
        denoiser = Denoiser(jax.tree.map(lambda a: scale * a, Toy.init()), Epsilon())
        solver = sampler.solver_for(Epsilon(), eta=0.5 * scale if sampler.name == "ddim" else None)
        x, state = scale * noise(), begin(denoiser, noise(), schedule, solver)
        for index in range(3):
            x, _, state = run(denoiser, x, state, schedule, jnp.asarray(index), solver, key)
        return x

    plain = parse_discrete_config({"_class_name": "EulerDiscreteScheduler"}, name="config")
    other = dataclasses.replace(plain, beta_end=0.012, timestep_spacing="trailing")
    kwargs = {"gamma": 0.7} if sampler.name == "tcd" else {}
    one = steps(plain, jax.random.key(0), 1.0)
    two = steps(other, jax.random.key(1), 0.5, **kwargs)
    if sampler.grid.levels in ("real", "inner"):
        steps(plain, jax.random.key(0), 1.0, kind="karras")
        steps(plain, jax.random.key(0), 1.0, sigmas=[9.0, 3.0, 1.0])
    assert len(compiles) == 1
    assert relative_error(one, two) > 0.01


# Names.


@pytest.mark.parametrize(
    ("asked", "name", "kind"),
    [
        ("euler", "euler", None),
        ("Euler a", "euler-ancestral", None),
        ("DPM++ 2M Karras", "dpmpp-2m", "karras"),
        ("DPM++ 2M SDE Karras", "dpmpp-2m-sde", "karras"),
        ("DPM++ SDE Exponential", "dpmpp-sde", "exponential"),
        ("dpmpp-2m-beta", "dpmpp-2m", "beta"),
        ("Heun Align Your Steps", "heun", "ays"),
        ("PLMS", "pndm", None),
        ("UniPCMultistepScheduler", "unipc", None),
        ("FlowMatchEulerDiscreteScheduler", "euler", None),
        ("ddim", "ddim", None),
        ("LMS Karras", "lms", "karras"),
    ],
)
def test_samplers_are_found_by_the_names_people_use(asked, name, kind):
    sampler = find_sampler(asked)
    assert (sampler.name, sampler.kind) == (name, kind)


def test_every_sampler_has_one_line_and_names_of_its_own():
    names = [name for sampler in SAMPLERS for name in (sampler.name, *sampler.aliases)]
    assert len({name.lower() for name in names}) > len(names) - len(SAMPLERS)  # A1111's may be ours
    for sampler in SAMPLERS:
        assert sampler.summary
        assert "\n" not in sampler.summary
        for name in (sampler.name, *sampler.aliases):
            assert find_sampler(name) == sampler


@pytest.mark.parametrize(
    ("asked", "nearest"), [("eular", "euler"), ("DPM++ 3M", "dpmpp-2m"), ("", "sampler")]
)
def test_an_unknown_sampler_names_the_nearest(asked, nearest):
    with pytest.raises(SettingError, match=nearest):
        find_sampler(asked)


def test_a_sampler_with_timesteps_of_its_own_takes_no_other_sigmas():
    with pytest.raises(SettingError, match="ddim has timesteps of its own"):
        find_sampler("DDIM Karras")


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_a_sampler_works_on_a_flow_or_says_that_it_cannot(sampler):
    if sampler.flow is None:
        with pytest.raises(SettingError, match=f"{sampler.name} cannot be used with a rectified"):
            sampler.solver_for(Flow())
        return
    solver, denoiser = sampler.solver_for(Flow()), Denoiser(Toy.init(), Flow())
    exact = whole(denoiser, noise(), flow_schedule(512), Heun(straight=True))
    x = whole(denoiser, noise(), flow_schedule(64), solver, key=jax.random.key(0))
    assert np.isfinite(x).all()
    if not solver.requires_key:
        assert relative_error(x, exact) < 0.02


def test_eta_is_ddims():
    assert isinstance(find_sampler("ddim").solver_for(Epsilon(), eta=0.5), StochasticDDIM)
    assert isinstance(find_sampler("ddim").solver_for(Epsilon(), eta=0.0), DDIM)
    with pytest.raises(SettingError, match=r"`eta` 1.5 is out of range"):
        find_sampler("ddim").solver_for(Epsilon(), eta=1.5)
    with pytest.raises(SettingError, match="euler has no `eta`"):
        find_sampler("euler").solver_for(Epsilon(), eta=0.5)
