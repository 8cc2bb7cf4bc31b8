"""Schedules of rectified flows: `alpha` is `1 - sigma` and the timestep is `1000 * sigma`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._config import parse_config, shorten
from .._errors import ConfigError, SettingError
from .schedule import Schedule
from .spacing import Spacing, explicit, spread


@dataclasses.dataclass(frozen=True)
class FlowSchedulerConfig:
    """The `scheduler_config.json` of a rectified flow (FlowMatchEulerDiscreteScheduler).

    **Arguments:**

    - `shift`: the static shift, which dynamic shifting does not use.
    - `use_dynamic_shifting`: whether the shift depends on the number of image tokens.
    - `base_shift`, `max_shift`: the logarithm of the dynamic shift at `base_image_seq_len` and at
        `max_image_seq_len` tokens. The logarithm is linear in the number of tokens.
    - `time_shift_type`: with `"linear"` the shift itself is linear, not its logarithm.
    - `shift_terminal`: the sigmas are stretched so that the last one before 0 is this number.
    - `use_karras_sigmas`, `use_exponential_sigmas`, `use_beta_sigmas`: whether to spread the sigmas
        anew between the first and the last one before 0.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    def __post_init__(self):
        if self.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type: {self.time_shift_type!r} is not supported")
        if self.max_image_seq_len == self.base_image_seq_len:
            raise ValueError("max_image_seq_len: must differ from base_image_seq_len")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: {self.shift} is not a number above 0")
        if not 0 <= (self.shift_terminal or 0) < 1:
            raise ValueError(f"shift_terminal: {self.shift_terminal} is not from 0 to 1")
        for name in ("base_image_seq_len", "max_image_seq_len"):
            if not 0 < getattr(self, name) < 2**31:
                raise ValueError(f"{name}: {shorten(getattr(self, name))} is not a size")
        if sum((self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas)) > 1:
            raise ValueError("use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: only one")

    @property
    def kind(self) -> Spacing | None:
        """How to spread the sigmas anew; `None` leaves them as they are."""
        if self.use_karras_sigmas:
            return "karras"
        if self.use_exponential_sigmas:
            return "exponential"
        return "beta" if self.use_beta_sigmas else None


def parse_flow_config(fields: Mapping[str, Any], *, name: str) -> FlowSchedulerConfig:
    """Reads the JSON object of a `scheduler_config.json`.

    **Raises:** `ConfigError` for a class, field or value that is not computed here.
    """
    return parse_config(
        FlowSchedulerConfig,
        fields,
        name=name,
        supported={
            "_class_name": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
            "num_train_timesteps": (1000,),
            "invert_sigmas": (False,),
            "stochastic_sampling": (False,),
        },
    )


def dynamic_shift(config: FlowSchedulerConfig, sequence_length: int) -> float:
    """Returns the shift for an image of `sequence_length` tokens: `exp(mu)`, mu linear in the
    length.

    **Raises:** `ConfigError` where the config leads to a shift that is not a number above 0.

    Source: https://arxiv.org/abs/2403.03206, section 5.3.2; `calculate_shift` of diffusers' FLUX.
    """
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    mu = sequence_length * slope + (config.base_shift - slope * config.base_image_seq_len)
    # Beyond this range float32 would round it to 0 or to infinity.
    if config.time_shift_type == "exponential" and abs(mu) < 80:
        return math.exp(mu)
    if config.time_shift_type == "linear" and 0 < mu < math.inf:
        return mu
    raise ConfigError(
        f"The scheduler's base_shift {config.base_shift:g} and max_shift {config.max_shift:g} give "
        f"no usable shift for {sequence_length} image tokens."
    )


def flow_schedule(steps: int, *, shift: float = 1.0) -> Schedule:
    """Makes `steps` equal steps from noise to data, then shifts them:
    `sigma <- S sigma / (1 + (S - 1) sigma)`.

    **Raises:** `SettingError` where a number is out of range.
    """
    return flow_sigmas(FlowSchedulerConfig(), steps, shift=shift)


def flow_sigmas(
    config: FlowSchedulerConfig,
    steps: int,
    *,
    sequence_length: int | None = None,
    shift: float | None = None,
    kind: Spacing | None = None,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """Makes the schedule of a rectified flow, which to float32 rounding is that of diffusers' FLUX
    pipeline.

    **Arguments:**

    - `steps`: the number of steps.
    - `sequence_length`: the number of image tokens, which dynamic shifting depends on.
    - `shift`: a static shift in place of the config's shift, dynamic or not.
    - `kind`: how to spread the sigmas between the first and the last one before 0, in place of the
        config's way.
    - `sigmas`: the noise levels of all steps. They are not shifted. They must fall from at most 1,
        and the final 0 may be left out.

    **Raises:** `SettingError` where a number is out of range.
    """
    if sigmas is not None:
        return _straight(explicit(sigmas, steps, largest=1.0))
    if steps < 1:
        raise SettingError(f"`steps` {steps} is out of range: it is at least 1.")
    if shift is not None and not 0 < shift < math.inf:
        raise SettingError(f"`shift` {shift:g} is out of range: it is a number above 0.")
    if shift is None and config.use_dynamic_shifting:
        if sequence_length is None:
            raise ValueError("Dynamic shifting needs the number of image tokens.")
        factor = dynamic_shift(config, sequence_length)
    else:
        factor = config.shift if shift is None else shift
    # In float32 from here on, for the same rounding as the reference.
    levels = np.linspace(1, 1 / steps, steps).astype(np.float32)
    if shift is None and config.use_dynamic_shifting:
        levels = factor / (factor + (1 / levels - 1))
    else:
        levels = factor * levels / (1 + (factor - 1) * levels)
    if config.shift_terminal and steps > 1:
        levels = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - config.shift_terminal))
    kind = kind or config.kind
    if kind is not None:
        levels = spread(kind, float(levels[0]), float(levels[-1]), steps)
    return _straight(np.append(levels, 0))


def _straight(sigma: np.ndarray) -> Schedule:
    sigma = sigma.astype(np.float32)
    return Schedule.init(1 - sigma, sigma, np.float32(1000) * sigma)
