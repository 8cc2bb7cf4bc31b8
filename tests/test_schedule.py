import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import reference

from eqxdiff._errors import ConfigError, SettingError
from eqxdiff.sampling import (
    Schedule,
    add_noise,
    dynamic_shift,
    flow_schedule,
    flow_sigmas,
    parse_flow_config,
)


FLOW = {
    "static": {"shift": 3.0},
    "unshifted": {"shift": 1.0},
    "dynamic": {"shift": 3.0, "use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "narrow": {
        "use_dynamic_shifting": True,
        "base_shift": 0.4,
        "max_shift": 1.3,
        "base_image_seq_len": 128,
        "max_image_seq_len": 2048,
    },
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "karras": {"shift": 2.0, "use_karras_sigmas": True},
    "exponential": {"shift": 2.0, "use_exponential_sigmas": True},
    "beta": {"shift": 2.0, "use_beta_sigmas": True},
}


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
