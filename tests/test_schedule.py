import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_cases import FLOW
from toy import reference

from eqxdiff._errors import ConfigError, SettingError
from eqxdiff.sampling import (
    AYS_TABLES,
    SAMPLERS,
    Schedule,
    add_noise,
    alphas_cumprod,
    default_sampler,
    discrete_schedule,
    dynamic_shift,
    find_sampler,
    flow_schedule,
    flow_sigmas,
    noise_levels,
    parse_discrete_config,
    parse_flow_config,
    spacing as spreads,
)


@pytest.mark.parametrize("name", FLOW)
def test_flow_schedules_are_those_of_diffusers_bit_for_bit(name):
    config = parse_flow_config(FLOW[name], name="scheduler_config.json")
    cases = [key for key in reference() if key.startswith(f"flow/{name}/")]
    assert len(cases) >= 4
    for case in cases:
        steps, tokens = map(int, case.split("/")[2:])
        schedule = flow_sigmas(config, steps, sequence_length=tokens)
        np.testing.assert_array_equal(schedule.sigma, reference()[case])
        np.testing.assert_array_equal(schedule.alpha, 1 - reference()[case])
        np.testing.assert_array_equal(schedule.timestep, 1000 * reference()[case])


def test_dynamic_shift_is_a_line_through_the_two_lengths():
    config = parse_flow_config({}, name="scheduler_config.json")
    assert dynamic_shift(config, 256) == pytest.approx(math.exp(0.5))
    assert dynamic_shift(config, 4096) == pytest.approx(math.exp(1.15))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_shift": 1e9},
        {"base_shift": -1e9, "max_shift": -1e9},
        {"max_shift": math.nan},
        {"base_shift": -2.0, "time_shift_type": "linear"},
    ],
)
def test_a_dynamic_shift_that_is_no_number_is_refused(fields):
    config = parse_flow_config({"use_dynamic_shifting": True, **fields}, name="json")
    with pytest.raises(ConfigError, match=r"base_shift .* and max_shift .* for 512 image tokens"):
        flow_sigmas(config, 4, sequence_length=512)


def test_errors_of_configs_are_short():
    """Long values, long names, and many of them; nothing of them reaches the terminal raw."""
    for fields in (
        {"shift": "x" * 5000},
        {"\x1b[31m" + "k" * 5000: [1] * 5000},
        {"timestep_spacing": "x" * 5000},
        {"_class_name": ["x"] * 5000},
        {f"unknown_{k}": "x" * 500 for k in range(500)},
    ):
        for parse in (parse_flow_config, parse_discrete_config):
            with pytest.raises(ConfigError) as caught:
                parse({"_class_name": "EulerDiscreteScheduler", **fields}, name="json")
            lines = str(caught.value).splitlines()
            assert len(lines) <= 13
            assert max(map(len, lines)) < 220
            assert "\x1b" not in str(caught.value)
    assert lines[-1] == "  and 489 more"


def test_a_shift_from_the_user_replaces_dynamic_shifting():
    dynamic = parse_flow_config(FLOW["dynamic"], name="scheduler_config.json")
    schedule = flow_sigmas(dynamic, 4, sequence_length=4096, shift=2.0)
    np.testing.assert_array_equal(schedule.sigma, flow_schedule(4, shift=2.0).sigma)
    np.testing.assert_allclose(schedule.sigma, [1, 6 / 7, 2 / 3, 0.4, 0], rtol=1e-6)


def test_sigmas_from_the_user_are_taken_as_they_are():
    config = parse_flow_config(FLOW["dynamic"], name="scheduler_config.json")
    schedule = flow_sigmas(config, 3, sigmas=[0.9, 0.5, 0.1])
    np.testing.assert_array_equal(schedule.sigma, np.float32([0.9, 0.5, 0.1, 0]))


@pytest.mark.parametrize(
    ("steps", "kwargs"),
    [
        (0, {}),
        (4, {"shift": 0.0}),
        (4, {"shift": math.nan}),
        (2, {"sigmas": [0.5, 0.9]}),
        (2, {"sigmas": [1.5, 0.9]}),
        (2, {"sigmas": [0.9, -0.1]}),
        (2, {"sigmas": [0.9, math.nan]}),
        (2, {"sigmas": [0.0]}),
        (2, {"sigmas": []}),
        (3, {"sigmas": [0.9, 0.5]}),
    ],
)
def test_settings_out_of_range_are_refused(steps, kwargs):
    config = parse_flow_config({}, name="scheduler_config.json")
    with pytest.raises(SettingError):
        flow_sigmas(config, steps, **kwargs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("time_shift_type", "cubic"),
        ("num_train_timesteps", 500),
        ("_class_name", "DDIMScheduler"),
        ("shfit", 1.0),
        ("shift", 0.0),
        ("max_image_seq_len", 256),
        ("shift", math.nan),
        ("shift", 10**400),
        ("shift_terminal", 1.0),
        ("base_image_seq_len", 10**400),
    ],
)
def test_an_unsupported_flow_config_names_the_field(field, value):
    with pytest.raises(ConfigError, match=field):
        parse_flow_config({field: value}, name="scheduler_config.json")


def test_a_schedule_is_indexed_by_a_traced_row_and_cut():
    schedule = flow_schedule(4)
    row = jax.jit(lambda s, i: s[i])(schedule, jnp.asarray(3))
    assert (float(row.alpha), float(row.sigma), float(row.timestep)) == (0.75, 0.25, 250.0)
    assert schedule.steps == 4
    assert schedule.since(1).steps == 3
    np.testing.assert_array_equal(schedule.since(1).sigma, schedule.sigma[1:])
    with pytest.raises(SettingError):
        schedule.since(4)


def test_noise_is_added_by_the_row():
    schedule = Schedule.init([0.6, 1], [0.8, 0], [700, 0])
    x0, noise = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, -1.0])
    np.testing.assert_allclose(add_noise(x0, noise, schedule[0]), [3.0, 0.4], rtol=1e-6)


def discrete(scheduler="DDIMScheduler", **fields):
    known = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    extra = {"clip_sample": False, "skip_prk_steps": True}
    return parse_discrete_config(
        {"_class_name": scheduler, **known, **extra, **fields}, name="json"
    )


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_the_rows_of_a_ddpm_preserve_variance_and_fall(sampler):
    """The last timestep may be 0 before the last row is, whose timestep no network is told."""
    levels = noise_levels(discrete())
    for spacing in (None, "leading", "trailing", "linspace"):
        config = discrete(timestep_spacing=spacing, steps_offset=1)
        for steps in (1, 2, 7, 30):
            schedule = discrete_schedule(config, steps, sampler.grid)
            assert schedule.steps == steps
            np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-6)
            assert (np.diff(schedule.sigma[:-1]) < 0).all()
            assert (np.diff(schedule.timestep[:-1]) < 0).all()
            assert schedule.sigma[-1] <= schedule.sigma[-2]
            told = np.interp(schedule.timestep[:-1], levels.timestep, levels.sigma)
            np.testing.assert_allclose(schedule.sigma[:-1], told, atol=1e-3)


def test_the_training_levels_are_those_of_the_betas():
    levels = noise_levels(discrete())
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(levels.alpha**2, np.cumprod(1 - betas), rtol=1e-5)
    np.testing.assert_array_equal(levels.timestep, np.arange(1000))
    given = discrete(trained_betas=betas.tolist())
    np.testing.assert_allclose(alphas_cumprod(given), alphas_cumprod(discrete()), rtol=1e-5)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_level():
    plain, zero = discrete(), discrete(rescale_betas_zero_snr=True)
    assert alphas_cumprod(zero)[-1] == 0
    assert alphas_cumprod(zero)[0] == pytest.approx(alphas_cumprod(plain)[0], rel=1e-6)
    trailing = discrete(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    schedule = discrete_schedule(trailing, 4, find_sampler("ddim").grid)
    assert (float(schedule.alpha[0]), float(schedule.sigma[0])) == (0, 1)
    assert noise_levels(zero).sigma[-1] == 1


@pytest.mark.parametrize(
    ("scheduler", "fields", "clean"),
    [
        ("DDIMScheduler", {}, True),
        ("DDIMScheduler", {"set_alpha_to_one": False}, False),
        ("PNDMScheduler", {}, False),
        ("PNDMScheduler", {"set_alpha_to_one": True}, True),
        ("EulerDiscreteScheduler", {"set_alpha_to_one": False}, True),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, False),
        ("HeunDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, True),
    ],
)
def test_where_sampling_ends_is_read_from_the_config(scheduler, fields, clean):
    """Lightning's 2.9 % of noise left is DDIM's with set_alpha_to_one false; Euler's is none."""
    config = discrete(scheduler, **fields)
    last = discrete_schedule(config, 4, default_sampler(config).grid)[-1]
    assert float(last.sigma) == pytest.approx(0 if clean else 0.02915, abs=1e-5)


def test_align_your_steps_is_the_published_table_in_ten_steps():
    config, grid = discrete(), find_sampler("euler").grid
    for table in AYS_TABLES.values():
        schedule = discrete_schedule(config, 10, grid, kind="ays", table=table)
        np.testing.assert_allclose(schedule.sigma / schedule.alpha, [*table[:-1], 0], rtol=1e-5)
        more = discrete_schedule(config, 20, grid, kind="ays", table=table)
        found = more.sigma / more.alpha
        np.testing.assert_allclose(found[2:-1:2], table[1:-1], rtol=1e-5)
        np.testing.assert_allclose(found[1] ** 2, found[0] * found[2], rtol=1e-5)
    with pytest.raises(SettingError, match="No table"):
        discrete_schedule(config, 10, grid, kind="ays")


@pytest.mark.parametrize(
    ("model", "timesteps"),
    [
        ("sd", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_the_tables_lie_at_their_published_timesteps(model, timesteps):
    grid, table = find_sampler("euler").grid, spreads.AYS_TABLES[model]
    schedule = discrete_schedule(discrete(), 10, grid, kind="ays", table=table)
    np.testing.assert_allclose(schedule.timestep[:-1], timesteps, atol=1.5)


def test_a_list_of_sigmas_is_taken_as_it_is():
    schedule = discrete_schedule(discrete(), 3, find_sampler("euler").grid, sigmas=[14.6, 2.0, 0.3])
    np.testing.assert_allclose(schedule.sigma / schedule.alpha, [14.6, 2.0, 0.3, 0], rtol=1e-5)
    levels = noise_levels(discrete())
    told = np.interp([14.6, 2.0, 0.3], levels.sigma / levels.alpha, np.arange(1000))
    np.testing.assert_allclose(schedule.timestep[:-1], told, atol=0.5)


@pytest.mark.parametrize(
    ("name", "steps", "kwargs"),
    [
        ("euler", 0, {}),
        ("euler", 1001, {}),
        ("dpmpp-2m", 1000, {}),
        ("lcm", 51, {}),
        ("ddim", 4, {"kind": "karras"}),
        ("lcm", 3, {"sigmas": [9.0, 3.0, 1.0]}),
        ("euler", 3, {"sigmas": [3.0, 9.0, 1.0]}),
        ("euler", 4, {"sigmas": [9.0, 3.0, 1.0]}),
    ],
)
def test_steps_that_cannot_be_made_are_refused(name, steps, kwargs):
    with pytest.raises(SettingError):
        discrete_schedule(discrete(), steps, find_sampler(name).grid, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "fields", "name"),
    [
        ("PNDMScheduler", {}, "pndm"),
        ("EulerAncestralDiscreteScheduler", {}, "euler-ancestral"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp-2m"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp-2m-sde"),
    ],
)
def test_the_config_names_the_sampler(scheduler, fields, name):
    assert default_sampler(discrete(scheduler, **fields)).name == name


def test_a_scheduler_that_is_not_ours_still_tells_its_noise():
    """Another sampler can be chosen for it."""
    config = discrete("KDPM2DiscreteScheduler")
    assert discrete_schedule(config, 5, find_sampler("euler").grid).steps == 5
    with pytest.raises(ConfigError, match="KDPM2DiscreteScheduler"):
        default_sampler(config)


def test_the_published_scheduler_configs_are_understood():
    """As in the repositories of Stable Diffusion 1.5, 2.1 and SDXL."""
    stable = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    two = {**stable, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    xl = {
        **stable,
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    }
    configs = [parse_discrete_config(fields, name="json") for fields in (stable, two, xl)]
    assert [default_sampler(config).name for config in configs] == ["pndm", "ddim", "euler"]
    assert [config.prediction_type for config in configs] == ["epsilon", "v_prediction", "epsilon"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_sample", True),
        ("thresholding", True),
        ("beta_schedule", "sigmoid"),
        ("timestep_spacing", "random"),
        ("prediction_type", "flow_prediction"),
        ("num_train_timesteps", 4000),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("algorithm_type", "dpmsolver"),
        ("solver_order", 3),
        ("use_lu_lambdas", True),
        ("sigma_max", 80.0),
        ("variance_type", "learned_range"),
        ("trained_betas", [0.1, 0.2]),
        ("original_inference_steps", 0),
        ("beta_start", math.nan),
        ("beta_end", 1.0),
        ("beta_start", 0.0),
        ("set_alpha_to_two", True),
    ],
)
def test_an_unsupported_ddpm_config_names_the_field(field, value):
    with pytest.raises(ConfigError, match=field):
        discrete(**{field: value})


def test_what_a_class_assumes_for_absent_fields_counts():
    with pytest.raises(ConfigError, match="clip_sample"):
        parse_discrete_config({"_class_name": "DDIMScheduler"}, name="json")
    with pytest.raises(ConfigError, match="skip_prk_steps"):
        parse_discrete_config({"_class_name": "PNDMScheduler"}, name="json")
    with pytest.raises(ConfigError, match="_class_name"):
        parse_discrete_config({"beta_start": 0.1}, name="json")
    assert parse_discrete_config({"_class_name": "LCMScheduler"}, name="json").beta_end == 0.012
