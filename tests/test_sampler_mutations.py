"""Every constant of schedules and solvers, broken one at a time: each must fail a parity test."""

import jax
import pytest
import test_schedule
import test_solvers
from mutate import Mutation, apply


DISCRETE, SPACING, FLOW = "sampling.discrete", "sampling.spacing", "sampling.flow"
BASE, SOLVERS = "sampling.solvers._base", "sampling.solvers"
SCHEDULE = f"{DISCRETE}:discrete_schedule"
NUMBERS = [
    # Betas.
    Mutation(
        "cap of cosine betas",
        "ddim/cosine from the capped level",
        f"{DISCRETE}:alphas_cumprod",
        "0.999)",
        "0.99)",
    ),
    Mutation(
        "offset of cosine betas",
        "ddim/cosine",
        f"{DISCRETE}:alphas_cumprod",
        "(u + 0.008) / 1.008",
        "(u + 0.007) / 1.007",
    ),
    Mutation(
        "power of cosine betas",
        "ddim/cosine",
        f"{DISCRETE}:alphas_cumprod",
        "np.pi / 2) ** 2",
        "np.pi / 2) ** 3",
    ),
    Mutation(
        "square of scaled betas",
        "ddim/leading",
        f"{DISCRETE}:alphas_cumprod",
        ".astype(f32) ** 2",
        ".astype(f32) ** 2.01",
    ),
    Mutation(
        "root of scaled betas",
        "ddim/leading",
        f"{DISCRETE}:alphas_cumprod",
        "np.linspace(start**0.5, end**0.5, LEVELS)",
        "(np.linspace(start, end, LEVELS) ** 0.5)",
    ),
    Mutation(
        "scaled for linear betas",
        "ddim/linear",
        f"{DISCRETE}:alphas_cumprod",
        "np.linspace(start, end, LEVELS)",
        "(np.linspace(start**0.5, end**0.5, LEVELS) ** 2)",
    ),
    Mutation(
        "first level of zero SNR",
        "ddim/zero snr",
        f"{DISCRETE}:alphas_cumprod",
        "(first / (first - last))",
        "1",
    ),
    Mutation(
        "zero SNR of the squares",
        "ddim/zero snr",
        f"{DISCRETE}:alphas_cumprod",
        "root = np.sqrt(product)",
        "root = product",
    ),
    Mutation(
        "no zero SNR",
        "ddim/zero snr",
        f"{DISCRETE}:alphas_cumprod",
        "if config.rescale_betas_zero_snr",
        "if False",
    ),
    Mutation("least alpha of zero SNR", "euler/zero snr", SCHEDULE, "2.0**-24", "2.0**-20"),
    Mutation(
        "least alpha of DDIM",
        "ddim/zero snr",
        SCHEDULE,
        '(grid.levels in ("real", "inner") or grid.final == "pndm")',
        "True",
    ),
    # Timesteps.
    Mutation(
        "offset of leading steps",
        "ddim/leading",
        f"{DISCRETE}:_timesteps",
        "+ config.steps_offset",
        "+ 0",
    ),
    Mutation(
        "trailing steps from 998",
        "ddim/trailing v",
        f"{DISCRETE}:_timesteps",
        ".round() - 1",
        ".round() - 2",
    ),
    Mutation(
        "linspace up to 998",
        "euler/default spacing",
        f"{DISCRETE}:_timesteps",
        "np.linspace(0, LEVELS - 1, laid)",
        "np.linspace(0, LEVELS - 2, laid)",
    ),
    Mutation(
        "rounded linspace",
        "euler/default spacing",
        f"{DISCRETE}:_timesteps",
        'if levels != "real":',
        "if True:",
    ),
    Mutation(
        "linspace not rounded",
        "dpmpp-2m/default spacing",
        f"{DISCRETE}:_timesteps",
        'if levels != "real":',
        "if False:",
    ),
    Mutation(
        "one step fewer laid out",
        "dpmpp-2m/leading",
        f"{DISCRETE}:_timesteps",
        'steps + 1 if levels == "inner" else steps',
        "steps",
    ),
    Mutation(
        "one step more laid out",
        "euler/leading",
        f"{DISCRETE}:_timesteps",
        'steps + 1 if levels == "inner" else steps',
        "steps + 1",
    ),
    Mutation(
        "levels not interpolated",
        "euler/default spacing",
        SCHEDULE,
        "np.interp(timesteps, np.arange(LEVELS), table_s)",
        "table_s[timesteps.astype(int)]",
    ),
    Mutation(
        "distilled from 50 always",
        "lcm/of 20",
        f"{DISCRETE}:_timesteps",
        "LEVELS // original",
        "LEVELS // 50",
    ),
    Mutation(
        "distilled steps to the end",
        "lcm/4 steps",
        f"{DISCRETE}:_timesteps",
        "np.linspace(0, original, steps, endpoint=False)",
        "np.linspace(0, original - 1, steps)",
    ),
    Mutation(
        "distilled steps rounded up",
        "lcm/7 steps v",
        f"{DISCRETE}:_timesteps",
        "np.floor(np.linspace",
        "np.ceil(np.linspace",
    ),
    Mutation(
        "distilled steps from 1000",
        "lcm/4 steps",
        f"{DISCRETE}:_timesteps",
        "* every - 1",
        "* every - 2",
    ),
    # Ends.
    Mutation(
        "DDIM ends at level 0",
        "ddim/leading",
        SCHEDULE,
        "config.set_alpha_to_one is False",
        "not config.set_alpha_to_one",
    ),
    Mutation(
        "DDIM ends at no noise",
        "ddim/to level 0",
        SCHEDULE,
        "config.set_alpha_to_one is False",
        "False",
    ),
    Mutation(
        "PNDM ends at no noise",
        "pndm/leading",
        SCHEDULE,
        "not config.set_alpha_to_one",
        "config.set_alpha_to_one is False",
    ),
    Mutation(
        "PNDM ends at level 0", "pndm/to clean", SCHEDULE, "not config.set_alpha_to_one", "True"
    ),
    Mutation(
        "Euler ends at no noise",
        "euler/to the smallest",
        SCHEDULE,
        'config.final_sigmas_type == "sigma_min"',
        "False",
    ),
    Mutation(
        "level 1 for level 0",
        "pndm/leading",
        SCHEDULE,
        "table_s[0] if first",
        "table_s[1] if first",
    ),
    Mutation("TCD ends at no noise", "tcd/4 steps", SCHEDULE, '"first": True', '"first": False'),
    Mutation(
        "start of trailing steps",
        "euler/lightning",
        SCHEDULE,
        "sigma[0] if noise_alone else 1.0",
        "1.0",
    ),
    Mutation("start of leading steps", "euler/leading", SCHEDULE, ' and spacing != "leading"', ""),
    # Spreads.
    Mutation("rho of Karras", "euler/karras", f"{SPACING}:spread", "1 / 7", "1 / 6"),
    Mutation("power of Karras", "euler/karras", f"{SPACING}:spread", ") ** 7", ") ** 6.9"),
    Mutation(
        "exponential steps",
        "euler/exponential v",
        f"{SPACING}:spread",
        "np.exp(np.linspace(np.log(largest), np.log(smallest), steps))",
        "np.linspace(largest, smallest, steps)",
    ),
    Mutation(
        "shape of Beta",
        "euler/beta",
        f"{SPACING}:spread",
        "betaincinv(0.6, 0.6",
        "betaincinv(0.5, 0.6",
    ),
    Mutation(
        "other shape of Beta",
        "euler/beta",
        f"{SPACING}:spread",
        "betaincinv(0.6, 0.6",
        "betaincinv(0.6, 0.7",
    ),
    Mutation(
        "beta the other way", "euler/beta", f"{SPACING}:spread", "1 - ramp)", "ramp)[::-1] * 1.01"
    ),
    Mutation(
        "timesteps linear in sigma",
        "euler/karras",
        f"{DISCRETE}:_timesteps_of",
        "np.interp(np.log(np.maximum(s, 1e-10)), np.log(table), ",
        "np.interp(s, table, ",
    ),
    Mutation(
        "Karras' timesteps truncated",
        "dpmpp-2m/karras",
        SCHEDULE,
        'if kind == "karras"',
        "if False",
    ),
    Mutation(
        "timesteps rounded", "dpmpp-2m/exponential v", SCHEDULE, 'if kind == "karras"', "if True"
    ),
    Mutation(
        "timesteps not whole",
        "dpmpp-2m/karras",
        SCHEDULE,
        'if grid.levels == "inner" and',
        "if False and",
    ),
    Mutation(
        "ends of the spread",
        "dpmpp-2m/karras",
        SCHEDULE,
        'levels if grid.levels == "real" else table_s[::-1]',
        "levels",
    ),
    Mutation(
        "ends of the real spread",
        "euler/karras",
        SCHEDULE,
        'levels if grid.levels == "real" else table_s[::-1]',
        "table_s[::-1]",
    ),
    Mutation(
        "the table of SD", "ays", SPACING, "AYS_TABLES", "{**AYS_TABLES, 'sd': AYS_TABLES['sdxl']}"
    ),
    Mutation(
        "the table of SDXL",
        "ays",
        SPACING,
        "AYS_TABLES",
        "{**AYS_TABLES, 'sdxl': AYS_TABLES['sd']}",
    ),
    Mutation(
        "one number of a table",
        "ays",
        SPACING,
        "AYS_TABLES",
        "{**AYS_TABLES, 'sd': (*AYS_TABLES['sd'][:6], 0.936, *AYS_TABLES['sd'][7:])}",
    ),
    Mutation(
        "steps between those of a table",
        "ays steps",
        f"{SPACING}:ays",
        "np.exp(np.interp(at, np.arange(len(table)), np.log(table)))[:-1]",
        "np.interp(at, np.arange(len(table)), table)[:-1]",
    ),
    # Rows within steps.
    Mutation(
        "mean of two levels",
        "dpmpp-sde/leading",
        SCHEDULE,
        "np.sqrt(levels[:-1] * np.where(levels[1:] > 0, levels[1:], levels[:-1]))",
        "(levels[:-1] + levels[1:]) / 2",
    ),
    Mutation(
        "gamma by default", "tcd/4 steps", SCHEDULE, "gamma: float = 0.3", "gamma: float = 0.31"
    ),
    Mutation(
        "gamma the other way",
        "tcd/gamma half",
        SCHEDULE,
        "(1 - gamma) * timesteps[1:]",
        "gamma * timesteps[1:] / 2",
    ),
    Mutation(
        "TCD's level rounded up",
        "tcd/4 steps",
        SCHEDULE,
        "np.floor((1 - gamma) * timesteps[1:])",
        "np.ceil((1 - gamma) * timesteps[1:])",
    ),
    # Flows.
    Mutation(
        "last sigma of a flow",
        "flow static",
        f"{FLOW}:flow_sigmas",
        "np.linspace(1, 1 / steps, steps)",
        "np.linspace(1, 0.01, steps)",
    ),
    Mutation(
        "static shift",
        "flow static",
        f"{FLOW}:flow_sigmas",
        "(1 + (factor - 1) * levels)",
        "(1 + factor * levels)",
    ),
    Mutation(
        "dynamic shift twice",
        "flow dynamic",
        f"{FLOW}:flow_sigmas",
        "factor / (factor + (1 / levels - 1))",
        "config.shift * factor / (config.shift * factor + (1 / levels - 1))",
    ),
    Mutation(
        "slope of dynamic shift",
        "flow dynamic",
        f"{FLOW}:dynamic_shift",
        "config.max_image_seq_len - config.base_image_seq_len",
        "config.max_image_seq_len",
    ),
    Mutation(
        "foot of dynamic shift",
        "flow narrow",
        f"{FLOW}:dynamic_shift",
        "slope * config.base_image_seq_len",
        "slope * 256",
    ),
    Mutation(
        "logarithm of the shift",
        "flow linear",
        f"{FLOW}:dynamic_shift",
        'if config.time_shift_type == "exponential"',
        "if True",
    ),
    Mutation(
        "end stretched to 0",
        "flow terminal",
        f"{FLOW}:flow_sigmas",
        "(1 - config.shift_terminal)",
        "1",
    ),
    Mutation(
        "flow spread from 1",
        "flow karras",
        f"{FLOW}:flow_sigmas",
        "spread(kind, float(levels[0]), float(levels[-1]), steps)",
        "spread(kind, 1.0, 1 / steps, steps)",
    ),
    Mutation(
        "timesteps of a flow",
        "flow static",
        f"{FLOW}:_straight",
        "np.float32(1000) * sigma",
        "np.float32(999) * sigma",
    ),
]
"""What is computed before anything is compiled."""

PROGRAMS = [
    Mutation(
        "a step's signal",
        "ddim/leading",
        f"{BASE}:transfer",
        "(to.alpha - ratio * row.alpha)",
        "(to.alpha - ratio)",
    ),
    Mutation(
        "a step's noise",
        "euler/leading",
        f"{BASE}:transfer",
        "to.sigma / row.sigma",
        "to.sigma / row.sigma * row.alpha",
    ),
    Mutation(
        "what is renewed",
        "ddpm/leading",
        f"{BASE}:ancestral",
        "to.sigma * row.alpha / (to.alpha * row.sigma)",
        "to.sigma / row.sigma",
    ),
    Mutation(
        "variance of what is renewed",
        "euler-ancestral/leading",
        f"{BASE}:ancestral",
        "1 - ratio**2",
        "1 - ratio",
    ),
    Mutation(
        "variance of what is kept",
        "euler-ancestral/leading",
        f"{BASE}:ancestral",
        "jnp.sqrt(1 - renewed**2)",
        "(1 - renewed)",
    ),
    Mutation("eta squared", "ddim/eta", f"{BASE}:ancestral", "eta * jnp.sqrt", "eta**2 * jnp.sqrt"),
    Mutation(
        "eta unread",
        "ddim/eta",
        f"{SOLVERS}.ddim:StochasticDDIM.step",
        "self.eta.astype(x.dtype)",
        "1.0",
    ),
    Mutation(
        "time of exponential integrators",
        "dpmpp-2m/leading",
        f"{BASE}:log_ratio",
        "log(row.alpha) - log(row.sigma)",
        "-log(row.sigma)",
    ),
    Mutation(
        "second draw is the first",
        "dpmpp-sde/leading",
        f"{BASE}:gaussian",
        "key[index, draw]",
        "key[index, 0]",
    ),
    Mutation(
        "weights of four noises",
        "pndm/leading",
        f"{SOLVERS}.pndm",
        "_ADAMS_BASHFORTH",
        "_ADAMS_BASHFORTH + np.array([[0]*4]*3 + [[1, -1, 0, 0]])",
    ),
    Mutation(
        "weights of three noises",
        "pndm/leading",
        f"{SOLVERS}.pndm",
        "_ADAMS_BASHFORTH",
        "_ADAMS_BASHFORTH + np.array([[0]*4]*2 + [[1, -1, 0, 0], [0]*4])",
    ),
    Mutation(
        "weights of two noises",
        "pndm/leading",
        f"{SOLVERS}.pndm",
        "_ADAMS_BASHFORTH",
        "_ADAMS_BASHFORTH + np.array([[0]*4, [1, -1, 0, 0], [0]*4, [0]*4])",
    ),
    Mutation(
        "first step's mean",
        "pndm/leading",
        f"{SOLVERS}.pndm:PNDM.step",
        ", to)) / 2",
        ", to)) / 2.01",
    ),
    Mutation(
        "one step's noise",
        "pndm/1 step",
        f"{SOLVERS}.pndm:PNDM.step",
        "schedule.steps == 1",
        "False",
    ),
    Mutation(
        "mean of two slopes",
        "heun/leading",
        f"{SOLVERS}.heun:Heun.step",
        "/ 2 * difference",
        "/ 2.01 * difference",
    ),
    Mutation(
        "Gauss's points",
        "lms/leading",
        f"{SOLVERS}.lms:_integrals",
        "(-(3**-0.5), 3**-0.5)",
        "(-0.5, 0.5)",
    ),
    Mutation(
        "three slopes of four",
        "lms/leading",
        f"{SOLVERS}.lms:LMS.step",
        "(index >= k)",
        "(index >= k) & (k < 3)",
    ),
    Mutation(
        "oldest slope first", "lms/leading", f"{SOLVERS}.lms:LMS.step", "slopes[:-1]", "slopes[1:]"
    ),
    Mutation(
        "half a step",
        "dpmpp-2m/leading",
        f"{SOLVERS}.dpmpp_2m:extrapolate",
        "jnp.where(second, now - past, 1) / 2",
        "jnp.where(second, now - past, 1) / 2.01",
    ),
    Mutation(
        "the other step's length",
        "dpmpp-2m/leading",
        f"{SOLVERS}.dpmpp_2m:extrapolate",
        "jnp.where(second, to - now, 0)",
        "jnp.where(second, now - past, 0)",
    ),
    Mutation(
        "second order to the end",
        "dpmpp-2m/few to the smallest",
        f"{SOLVERS}.dpmpp_2m:second_order",
        "schedule.steps < 15",
        "schedule.steps < 5",
    ),
    Mutation(
        "first order at the end of many",
        "dpmpp-2m/to the smallest",
        f"{SOLVERS}.dpmpp_2m:second_order",
        "schedule.steps < 15",
        "schedule.steps < 50",
    ),
    Mutation(
        "first order of the SDE",
        "dpmpp-2m-sde/leading",
        f"{SOLVERS}.dpmpp_2m_sde:DPMpp2MSDE.step",
        "ancestral(x, middle,",
        "ancestral(x, x0,",
    ),
    Mutation(
        "no noise in the SDE",
        "dpmpp-2m-sde/leading",
        f"{SOLVERS}.dpmpp_2m_sde:DPMpp2MSDE.step",
        "ancestral(x, middle, at, to, gaussian(key, index, x))",
        "ancestral(x, middle, at, to, gaussian(key, index, x), 0.0)",
    ),
    Mutation(
        "share of the first half",
        "dpmpp-sde/leading",
        f"{SOLVERS}.dpmpp_sde:DPMppSDE.step",
        "(s - s_half) / (s - s_to)",
        "(s - s_half) / s",
    ),
    Mutation(
        "one Brownian path",
        "dpmpp-sde/leading",
        f"{SOLVERS}.dpmpp_sde:DPMppSDE.step",
        "jnp.sqrt(share) * noises[0] + jnp.sqrt(1 - share) * noises[1]",
        "noises[0]",
    ),
    Mutation(
        "denoised at the start",
        "dpmpp-sde/leading",
        f"{SOLVERS}.dpmpp_sde:DPMppSDE.step",
        "ancestral(x, x0_half,",
        "ancestral(x, x0,",
    ),
    Mutation(
        "first correction",
        "unipc/leading",
        f"{SOLVERS}.unipc:UniPC.step",
        "mean - curve, 0.5)",
        "mean - curve, mean)",
    ),
    Mutation(
        "bend of the correction",
        "unipc/leading",
        f"{SOLVERS}.unipc:UniPC.step",
        "curve * growth * (past_x0",
        "curve * (past_x0",
    ),
    Mutation(
        "curve of the correction",
        "unipc/leading",
        f"{SOLVERS}.unipc:UniPC.step",
        "(mean - square) * growth",
        "(mean + square) * growth",
    ),
    Mutation(
        "no correction",
        "unipc/leading",
        f"{SOLVERS}.unipc:UniPC.step",
        "jnp.where(index > 0, corrected + (x - predicted), x)",
        "x",
    ),
    Mutation(
        "last prediction",
        "unipc/to the smallest",
        f"{SOLVERS}.unipc:UniPC.step",
        "(index > 0) & (index < schedule.steps - 1)",
        "(index > 0)",
    ),
    Mutation(
        "mean of exp", "moments", f"{SOLVERS}.unipc:_moments", "near**3 / 720", "near**3 / 700"
    ),
    Mutation(
        "spread of exp", "moments", f"{SOLVERS}.unipc:_moments", "near**2 / 240", "near**2 / 250"
    ),
    Mutation(
        "mean of exp far out",
        "moments",
        f"{SOLVERS}.unipc:_moments",
        "total - 1 / far",
        "total - 1.01 / far",
    ),
    Mutation(
        "scaling of LCM's timesteps",
        "lcm boundary",
        f"{SOLVERS}.lcm:LCM.step",
        "10 * schedule",
        "9 * schedule",
    ),
    Mutation(
        "sigma_data of LCM",
        "lcm boundary",
        f"{SOLVERS}.lcm:LCM.step",
        "0.25 / (time**2 + 0.25)",
        "0.24 / (time**2 + 0.25)",
    ),
    Mutation(
        "weight of LCM's network",
        "lcm boundary",
        f"{SOLVERS}.lcm:LCM.step",
        "time / (time**2 + 0.25) ** 0.5",
        "time / (time**2 + 0.24) ** 0.5",
    ),
    Mutation(
        "LCM's noise",
        "lcm/4 steps",
        f"{SOLVERS}.lcm:LCM.step",
        "schedule[index + 1])",
        "schedule[index])",
    ),
    Mutation(
        "TCD's ratio",
        "tcd/4 steps",
        f"{SOLVERS}.tcd:TCD.step",
        "to.alpha / within.alpha",
        "to.sigma / within.sigma",
    ),
    Mutation("TCD's noise", "tcd/4 steps", f"{SOLVERS}.tcd:TCD.step", "1 - ratio**2", "1 - ratio"),
    Mutation(
        "noise of a v-prediction",
        "ddim/trailing v",
        "sampling.parameterization:VPrediction.denoised",
        "row.alpha * x - row.sigma",
        "row.alpha * x + row.sigma",
    ),
    Mutation(
        "data of an epsilon",
        "ddim/leading",
        "sampling.parameterization:Epsilon.denoised",
        "jnp.where(known, row.alpha, 1)",
        "1",
    ),
    Mutation(
        "start",
        "euler/lightning",
        "sampling.sample:start",
        "schedule.start.astype(wide.dtype) * wide",
        "wide",
    ),
]
"""What is compiled."""


def check(name: str) -> None:
    """The test that has to fail."""
    match name.split(" ", 1):
        case ["flow", kind]:
            test_schedule.test_flow_schedules_are_those_of_diffusers_bit_for_bit(kind)
        case ["ays"]:
            tables = test_schedule.test_the_tables_lie_at_their_published_timesteps
            for model, timesteps in tables.pytestmark[0].args[1]:
                tables(model, timesteps)
        case ["ays", "steps"]:
            test_schedule.test_align_your_steps_is_the_published_table_in_ten_steps()
        case ["moments"]:
            for h in (0.49, 0.51, 2.0):
                test_solvers.test_the_moments_of_unipc_are_integrals(h)
        case ["lcm", "boundary"]:
            test_solvers.test_lcm_joins_the_network_to_x_at_timestep_0(0.1, 0.2, 0.8**0.5)
        case _:
            test_solvers.test_samplers_of_ddpms_agree_with_diffusers(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({m.check for m in [*NUMBERS, *PROGRAMS]}))
def test_the_checks_pass_unbroken(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", NUMBERS, ids=lambda mutation: mutation.name)
def test_another_number_is_seen(mutation, monkeypatch):
    apply(mutation, monkeypatch, traced=False)
    with pytest.raises(AssertionError):
        check(mutation.check)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", PROGRAMS, ids=lambda mutation: mutation.name)
def test_another_program_is_seen(mutation, monkeypatch):
    apply(mutation, monkeypatch)
    try:
        with pytest.raises(AssertionError):
            check(mutation.check)
    finally:
        jax.clear_caches()
