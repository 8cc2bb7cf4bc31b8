"""The `scheduler_config.json` of a model trained as a DDPM."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .._config import parse_config, shorten
from .._errors import ConfigError
from .spacing import Spacing


LEVELS = 1000
"""The noise levels of training."""


@dataclasses.dataclass(frozen=True)
class DiscreteSchedulerConfig:
    """The noise levels in a `scheduler_config.json`, whichever scheduler the file was written for.

    A field that is `None` is absent from the file. Then the sampler's own default holds, as when
    diffusers builds one scheduler from another scheduler's config.

    **Arguments:**

    - `scheduler`: the class that the file names; `default_sampler` reads it.
    - `beta_start`, `beta_end`, `beta_schedule`, `trained_betas`: the betas.
    - `rescale_betas_zero_snr`: whether to change the betas so that the last level is pure noise.
    - `timestep_spacing`: `"leading"`, `"trailing"` or `"linspace"`.
    - `steps_offset`: a number that leading spacing adds to its timesteps.
    - `set_alpha_to_one`: whether DDIM and PNDM end at no noise rather than at level 0.
    - `final_sigmas_type`: whether Euler, DPM++ and UniPC end at no noise (`"zero"`) or at level 0
        (`"sigma_min"`).
    - `prediction_type`: `"epsilon"`, `"v_prediction"` or `"sample"`.
    - `original_inference_steps`: the number of steps that LCM and TCD were distilled from.
    - `algorithm_type`: `"dpmsolver++"`, or `"sde-dpmsolver++"` with noise.
    - `use_karras_sigmas`, `use_exponential_sigmas`, `use_beta_sigmas`: how to spread the sigmas.
    """

    scheduler: str
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    final_sigmas_type: str = "zero"
    prediction_type: str = "epsilon"
    original_inference_steps: int = 50
    algorithm_type: str = "dpmsolver++"
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None

    def __post_init__(self):
        choices = {
            "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
            "timestep_spacing": (None, "leading", "trailing", "linspace"),
            "final_sigmas_type": ("zero", "sigma_min"),
            "prediction_type": ("epsilon", "v_prediction", "sample"),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        }
        for name, supported in choices.items():
            if getattr(self, name) not in supported:
                raise ValueError(f"{name}: {shorten(getattr(self, name))} is not supported")
        if self.trained_betas is not None and len(self.trained_betas) != LEVELS:
            raise ValueError(f"trained_betas: there must be {LEVELS}")
        for name, betas in [
            ("beta_start", (self.beta_start,)),
            ("beta_end", (self.beta_end,)),
            ("trained_betas", self.trained_betas or ()),
        ]:
            if not all(0 < beta < 1 for beta in betas):
                raise ValueError(f"{name}: a beta must lie between 0 and 1")
        if not 1 <= self.original_inference_steps <= LEVELS:
            raise ValueError(f"original_inference_steps: must be from 1 to {LEVELS}")
        kinds = (self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas)
        if sum(map(bool, kinds)) > 1:
            raise ValueError("use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: only one")

    @property
    def kind(self) -> Spacing | None:
        """How the file spreads the sigmas; `None` where it does not say."""
        if self.use_karras_sigmas:
            return "karras"
        if self.use_exponential_sigmas:
            return "exponential"
        return "beta" if self.use_beta_sigmas else None


def parse_discrete_config(fields: Mapping[str, Any], *, name: str) -> DiscreteSchedulerConfig:
    """Reads the JSON object of a `scheduler_config.json`.

    **Raises:** `ConfigError` for a field or value that is not computed here.
    """
    scheduler = fields.get("_class_name")
    if not isinstance(scheduler, str):
        raise ConfigError(
            f"{name} does not name its scheduler: _class_name is {shorten(scheduler)}."
        )
    # The defaults of absent fields depend on the class of diffusers.
    assumed: dict[str, Any] = {"scheduler": scheduler}
    if scheduler in ("LCMScheduler", "TCDScheduler"):
        assumed |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if scheduler in ("HeunDiscreteScheduler", "DPMSolverSDEScheduler"):
        assumed |= {"beta_start": 0.00085, "beta_end": 0.012}
    if scheduler in ("DDIMScheduler", "DDPMScheduler"):
        assumed |= {"clip_sample": True}
    if scheduler == "PNDMScheduler":
        assumed |= {"skip_prk_steps": False}
    supported = {
        "num_train_timesteps": (LEVELS,),
        "clip_sample": (False,),
        "thresholding": (False,),
        "variance_type": (None, "fixed_small"),
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "sigma_min": (None,),
        "sigma_max": (None,),
        "solver_order": (2,),
        "solver_type": ("midpoint", "bh2"),
        "lower_order_final": (True,),
        "euler_at_final": (False,),
        "predict_x0": (True,),
        "disable_corrector": ((),),
        "solver_p": (None,),
        "lambda_min_clipped": (-math.inf,),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "use_dynamic_shifting": (False, None),
        "shift_terminal": (None,),
        "timestep_scaling": (10.0,),
    }
    if scheduler == "PNDMScheduler":
        supported["skip_prk_steps"] = (True,)
    return parse_config(
        DiscreteSchedulerConfig,
        assumed | {k: v for k, v in fields.items() if k != "_class_name"},
        name=name,
        supported=supported,
        ignored=(
            "skip_prk_steps",
            "clip_sample_range",
            "dynamic_thresholding_ratio",
            "sample_max_value",
            "flow_shift",
            "time_shift_type",
            "noise_sampler_seed",
        ),
    )
