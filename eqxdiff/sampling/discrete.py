"""Schedules of models trained as DDPMs on a thousand discrete noise levels."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from .._errors import SettingError
from .discrete_config import LEVELS, DiscreteSchedulerConfig
from .schedule import Row, Schedule
from .spacing import Spacing, ays, explicit, spread


def alphas_cumprod(config: DiscreteSchedulerConfig) -> np.ndarray:
    """Returns the square of alpha at all thousand levels, in float32 as in the models' training.

    Source: https://arxiv.org/abs/2006.11239; squaredcos_cap_v2 is equation 17 of
    https://arxiv.org/abs/2102.09672; zero terminal SNR is algorithm 1 of
    https://arxiv.org/abs/2305.08891.
    """
    f32 = np.float32
    start, end = config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas, f32)
    elif config.beta_schedule == "linear":
        betas = np.linspace(start, end, LEVELS).astype(f32)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, LEVELS).astype(f32) ** 2
    else:
        u = np.linspace(0, 1, LEVELS + 1)
        curve = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999).astype(f32)
    product = _cumulative(1 - betas)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(product)
        first, last = root[0], root[-1]
        squared = ((root - last) * (first / (first - last))) ** 2
        betas = 1 - np.append(squared[:1], squared[1:] / squared[:-1])
        product = _cumulative(1 - betas)
    return product


def noise_levels(config: DiscreteSchedulerConfig) -> Row:
    """Returns all thousand levels, stacked, for training: row t has timestep t."""
    levels = _preserving(_exploding(alphas_cumprod(config)))
    timesteps = np.arange(LEVELS)
    return Row(*(jnp.asarray(v, jnp.float32) for v in (*levels, timesteps)))


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a family of samplers places its steps on the thousand levels.

    The families agree on the spacing that a config names. They differ in the details here, and
    pictures depend on these details.

    **Arguments:**

    - `levels`: `"whole"` rounds the timesteps. `"real"` does not round them: it interpolates the
        levels, and sampling may start from noise without a mean. `"inner"` rounds them, and places
        leading and linspace spacing as if there were one step more. `"distilled"` chooses among
        the steps that the model was distilled from.
    - `spacing`: the spacing where the config names none.
    - `final`: the level where sampling ends. `"clean"`: no noise. `"first"`: level 0. `"sigmas"`:
        as `final_sigmas_type` says. `"alpha"`, `"pndm"`: as `set_alpha_to_one` says; where absent
        it is true for `"alpha"` and false for `"pndm"`.
    - `middle`: a level within each step: none, the geometric mean of sigma / alpha, or the level
        that TCD denoises to before it adds noise.
    """

    levels: Literal["whole", "real", "inner", "distilled"]
    spacing: Literal["leading", "linspace"]
    final: Literal["clean", "first", "sigmas", "alpha", "pndm"]
    middle: Literal[None, "mean", "tcd"] = None


def discrete_schedule(
    config: DiscreteSchedulerConfig,
    steps: int,
    grid: Grid,
    *,
    kind: Spacing | Literal["ays"] | None = None,
    table: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    gamma: float = 0.3,
) -> Schedule:
    """Makes the schedule of a model trained as a DDPM.

    To float32 rounding it is the schedule of diffusers' scheduler for the same sampler, with two
    exceptions. DDIM and PNDM of diffusers step from each timestep to the one `1000 // steps` below.
    With linspace spacing, and with trailing spacing where `steps` does not divide 1000, that is not
    the timestep that they give the network next, so that the network sees more or less noise than
    it expects. Here each step ends at the level that the network expects next. And trailing spacing
    of diffusers may have one step too many for such numbers; here it never has.

    **Arguments:**

    - `config`: the checkpoint's config.
    - `steps`: the number of steps.
    - `grid`: the sampler's grid.
    - `kind`: how to spread the sigmas between the largest and the smallest, by default the config's
        way.
    - `table`: the model's table for `kind="ays"`, one of `AYS_TABLES`.
    - `sigmas`: all noise levels, as sigma / alpha. They must fall; the final 0 may be left out.
    - `gamma`: TCD's stochasticity: 0 adds no noise, and 1 starts anew in every step.

    **Raises:** `SettingError` where these steps cannot be made.
    """
    if not 1 <= steps <= LEVELS:
        raise SettingError(f"`steps` {steps} is out of range: it is from 1 to {LEVELS}.")
    products = alphas_cumprod(config)
    if config.rescale_betas_zero_snr and (grid.levels in ("real", "inner") or grid.final == "pndm"):
        products[-1] = 2.0**-24  # they divide by alpha
    spacing = config.timestep_spacing or grid.spacing
    timesteps = _timesteps(config, steps, grid.levels, spacing)
    if timesteps[-1] < 0 or (np.diff(timesteps) >= 0).any() or timesteps[0] > LEVELS - 1:
        raise SettingError(
            f"`steps` {steps} is out of range: the sampler cannot place as many on {LEVELS} levels."
        )

    table_s = _exploding(products)
    if grid.levels == "real":
        levels = np.interp(timesteps, np.arange(LEVELS), table_s)
    else:
        levels = table_s[timesteps.astype(int)]
    kind = kind or config.kind
    if sigmas is not None or kind is not None:
        if grid.levels in ("whole", "distilled"):
            what = "`sigmas`" if sigmas is not None else f"{kind} sigmas"
            raise SettingError(f"This sampler has timesteps of its own and cannot take {what}.")
        ends = levels if grid.levels == "real" else table_s[::-1]
        levels = _respread(kind, ends, steps, table, sigmas)
        timesteps = _timesteps_of(levels, table_s)
        if grid.levels == "inner" and sigmas is None and kind != "ays":
            # The reference truncates, and its largest timestep is rounded to just below 999.
            truncated = np.floor(np.maximum(timesteps - 1e-3, 0))
            timesteps = np.round(timesteps) if kind == "karras" else truncated

    first = {
        "clean": False,
        "first": True,
        "sigmas": sigmas is None and config.final_sigmas_type == "sigma_min",
        "alpha": config.set_alpha_to_one is False,
        "pndm": not config.set_alpha_to_one,
    }[grid.final]
    levels = np.append(levels, table_s[0] if first else 0.0)
    timesteps = np.append(timesteps, 0)
    alpha, sigma = _preserving(levels)
    noise_alone = grid.levels == "real" and spacing != "leading"
    middle = None
    if grid.middle == "tcd":
        within = np.floor((1 - gamma) * timesteps[1:]).astype(int)
        middle = (*_preserving(table_s[within]), within)
    elif grid.middle == "mean":
        means = np.sqrt(levels[:-1] * np.where(levels[1:] > 0, levels[1:], levels[:-1]))
        middle = (*_preserving(means), _timesteps_of(means, table_s))
    start = sigma[0] if noise_alone else 1.0
    return Schedule.init(alpha, sigma, timesteps, start=start, middle=middle)


def _timesteps(
    config: DiscreteSchedulerConfig, steps: int, levels: str, spacing: str
) -> np.ndarray:
    if levels == "distilled":
        original = config.original_inference_steps
        if steps > original:
            raise SettingError(
                f"`steps` {steps} is out of range: the model was distilled from {original}."
            )
        every = LEVELS // original
        indices = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
        return (np.arange(original, 0, -1) * every - 1)[indices]
    if spacing == "trailing":
        return np.arange(LEVELS, 0, -LEVELS / steps)[:steps].round() - 1
    laid = steps + 1 if levels == "inner" else steps
    if spacing == "leading":
        timesteps = np.arange(laid) * (LEVELS // laid) + config.steps_offset
    else:
        timesteps = np.linspace(0, LEVELS - 1, laid)
        if levels != "real":
            timesteps = timesteps.round()
    return timesteps[::-1][:steps].astype(np.float64)


def _respread(
    kind: Spacing | Literal["ays"] | None,
    ends: np.ndarray,
    steps: int,
    table: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> np.ndarray:
    """Returns the noise levels of all steps spread anew, without the final level."""
    if sigmas is not None:
        return explicit(sigmas, steps, largest=math.inf)[:-1]
    if kind == "ays":
        if table is None:
            raise SettingError("No table of Align Your Steps is published for this model.")
        return ays(table, steps)
    assert kind is not None
    return spread(kind, float(ends[0]), float(ends[-1]), steps)


def _timesteps_of(s: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns the real timesteps of noise levels, linear in the logarithm of sigma / alpha."""
    return np.interp(np.log(np.maximum(s, 1e-10)), np.log(table), np.arange(LEVELS))


def _cumulative(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _exploding(product: np.ndarray) -> np.ndarray:
    """Returns sigma / alpha, infinite where alpha is 0."""
    product = product.astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - product) / product)


def _preserving(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    alpha = 1 / np.sqrt(s**2 + 1)
    return alpha, np.where(np.isinf(s), 1.0, alpha * np.where(np.isinf(s), 0.0, s))
