"""Schedules of rectified flows: `alpha = 1 - sigma`, and the network is told `1000 * sigma`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._config import parse_config
from .._errors import SettingError
from .schedule import Schedule
from .spacing import Spacing, explicit, spread


@dataclasses.dataclass(frozen=True)
class FlowSchedulerConfig:
    """`scheduler_config.json` of a rectified flow (FlowMatchEulerDiscreteScheduler).

    **Arguments:**

    - `shift`: static shift; unused with dynamic shifting.
    - `use_dynamic_shifting`: the shift depends on the number of image tokens.
    - `base_shift`, `max_shift`: its logarithm at `base_image_seq_len` and at `max_image_seq_len`
        tokens, on a line between and beyond.
    - `time_shift_type`: `"linear"` takes the number on that line for the shift itself.
    - `shift_terminal`: stretches the sigmas so that the last one before 0 is this.
    - `use_karras_sigmas`, `use_exponential_sigmas`, `use_beta_sigmas`: respread the sigmas between
        the first and the last one before 0.
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
        if self.shift <= 0:
            raise ValueError(f"shift: {self.shift} is not above 0")
        if sum((self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas)) > 1:
            raise ValueError("use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: only one")

    @property
    def kind(self) -> Spacing | None:
        """How the sigmas are respread, where the file says so."""
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
    """The shift for an image of `sequence_length` tokens: `exp(mu)`, mu linear in the length.

    Source: https://arxiv.org/abs/2403.03206, section 5.3.2; `calculate_shift` of diffusers' FLUX.
    """
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    mu = sequence_length * slope + (config.base_shift - slope * config.base_image_seq_len)
    return math.exp(mu) if config.time_shift_type == "exponential" else mu


def flow_schedule(steps: int, *, shift: float = 1.0) -> Schedule:
    """`steps` equal steps from noise to data, shifted: `sigma <- S sigma / (1 + (S - 1) sigma)`.

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
    """The schedule of a rectified flow, to float32 rounding the one of diffusers' FLUX pipeline.

    **Arguments:**

    - `steps`: the number of steps.
    - `sequence_length`: the number of image tokens, which dynamic shifting depends on.
    - `shift`: a static shift instead of the config's, dynamic or not.
    - `kind`: how to spread the sigmas between the first and the last one before 0, instead of as
        the config says.
    - `sigmas`: the noise levels of all steps as they are, without shift: falling, the first at most
        1, with or without the final 0.

    **Raises:** `SettingError` where a number is out of range.
    """
    if sigmas is not None:
        return _straight(explicit(sigmas, steps, largest=1.0))
    if steps < 1:
        raise SettingError(f"The number of steps must be at least 1, not {steps}.")
    if shift is not None and not 0 < shift < math.inf:
        raise SettingError(f"The shift must be above 0, not {shift}.")
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
