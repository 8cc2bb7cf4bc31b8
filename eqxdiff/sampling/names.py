"""The samplers by the names that people use."""

import dataclasses
import difflib
import re
from typing import Literal

import jax.numpy as jnp

from .._config import cut, shorten
from .._errors import ConfigError, SettingError
from .discrete import Grid
from .discrete_config import DiscreteSchedulerConfig
from .parameterization import AbstractParameterization, Flow
from .solvers import (
    DDIM,
    DDPM,
    LCM,
    LMS,
    PNDM,
    TCD,
    AbstractSolver,
    DPMpp2M,
    DPMpp2MSDE,
    DPMppSDE,
    Euler,
    EulerAncestral,
    Heun,
    StochasticDDIM,
    UniPC,
)
from .spacing import Spacing


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A solver and the way that it places its steps.

    **Arguments:**

    - `name`: the sampler's name in this package.
    - `aliases`: its classes in diffusers and, last, its name in A1111's style.
    - `summary`: one line.
    - `solver`: the solver for models trained as DDPMs.
    - `grid`: how to place the steps on the thousand levels of such a model.
    - `flow`: the solver for rectified flows; `None` where the sampler has none.
    - `kind`: how to spread the sigmas; `None` where the name did not end in a way to.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    solver: AbstractSolver
    grid: Grid
    flow: AbstractSolver | None = None
    kind: Spacing | Literal["ays"] | None = None

    def solver_for(
        self, parameterization: AbstractParameterization, *, eta: float | None = None
    ) -> AbstractSolver:
        """Returns the solver for a model of this parameterization.

        **Arguments:**

        - `eta`: DDIM's share of new noise; 0 is none.

        **Raises:** `SettingError` where the sampler has no solver for it, or would ignore `eta`.
        """
        if eta is not None:
            if self.name != "ddim":
                raise SettingError(f"The sampler {self.name} has no `eta`: only ddim does.")
            if not 0 <= eta <= 1:
                raise SettingError(f"`eta` {eta:g} is out of range: it is from 0 to 1.")
        if isinstance(parameterization, Flow):
            if self.flow is None:
                usable = ", ".join(s.name for s in SAMPLERS if s.flow is not None)
                raise SettingError(
                    f"The sampler {self.name} cannot be used with a rectified flow; use {usable}."
                )
            return self.flow
        if eta:
            return StochasticDDIM(jnp.asarray(eta, jnp.float32))
        return self.solver


_REAL = Grid("real", "linspace", "clean")
_EULER = Grid("real", "linspace", "sigmas")
_INNER = Grid("inner", "linspace", "sigmas")

SAMPLERS = (
    Sampler(
        "euler",
        ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "Euler"),
        "Euler's method: first order, one evaluation a step; the default of flows",
        Euler(),
        _EULER,
        Euler(),
    ),
    Sampler(
        "euler-ancestral",
        ("EulerAncestralDiscreteScheduler", "Euler a"),
        "Euler's method with new noise at every step; never settles as steps grow",
        EulerAncestral(),
        _REAL,
        EulerAncestral(),
    ),
    Sampler(
        "heun",
        ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "Heun"),
        "Heun's method: second order, two evaluations a step",
        Heun(),
        _REAL,
        Heun(straight=True),
    ),
    Sampler(
        "lms",
        ("LMSDiscreteScheduler", "LMS"),
        "linear multistep through the last four slopes (flows: two), one evaluation a step",
        LMS(),
        _REAL,
        LMS(straight=True, order=2),
    ),
    Sampler(
        "ddim",
        ("DDIMScheduler", "DDIM"),
        "the deterministic sampler of DDPMs; `eta` above 0 adds noise",
        DDIM(),
        Grid("whole", "leading", "alpha"),
    ),
    Sampler(
        "ddpm",
        ("DDPMScheduler", "DDPM"),
        "ancestral sampling as in training: new noise at every step; needs many steps",
        DDPM(),
        Grid("whole", "leading", "clean"),
    ),
    Sampler(
        "pndm",
        ("PNDMScheduler", "PLMS"),
        "pseudo linear multistep of the predicted noise; the default of Stable Diffusion 1.5",
        PNDM(),
        Grid("whole", "leading", "pndm"),
    ),
    Sampler(
        "dpmpp-2m",
        ("DPMSolverMultistepScheduler", "DPM++ 2M"),
        "second order in the denoised data, one evaluation a step; good in 20 steps",
        DPMpp2M(),
        _INNER,
        DPMpp2M(),
    ),
    Sampler(
        "dpmpp-2m-sde",
        ("DPM++ 2M SDE",),
        "DPM++ 2M with new noise at every step",
        DPMpp2MSDE(),
        _INNER,
        DPMpp2MSDE(),
    ),
    Sampler(
        "dpmpp-sde",
        ("DPMSolverSDEScheduler", "DPM++ SDE"),
        "two evaluations a step, with the noise of one Brownian path",
        DPMppSDE(),
        dataclasses.replace(_REAL, middle="mean"),
    ),
    Sampler(
        "unipc",
        ("UniPCMultistepScheduler", "UniPC"),
        "second order; corrects every step without another evaluation; good in 10 steps",
        UniPC(),
        _INNER,
        UniPC(),
    ),
    Sampler(
        "lcm",
        ("LCMScheduler", "LCM"),
        "for latent consistency models: a few steps, each from new noise",
        LCM(),
        Grid("distilled", "leading", "clean"),
    ),
    Sampler(
        "tcd",
        ("TCDScheduler", "TCD"),
        "for trajectory consistency models: a few steps, partly from new noise",
        TCD(),
        Grid("distilled", "leading", "first", "tcd"),
    ),
)

_KINDS: dict[str, Spacing | Literal["ays"]] = {
    "karras": "karras",
    "exponential": "exponential",
    "beta": "beta",
    "ays": "ays",
    "alignyoursteps": "ays",
}


def find_sampler(name: str) -> Sampler:
    """Finds a sampler by its name here, its class in diffusers, or its name in A1111, such as
    "DPM++ 2M Karras".

    A name may end in a way to spread the sigmas: karras, exponential, beta or ays. Case, blanks and
    hyphens do not matter.

    **Raises:** `SettingError` that tells the nearest name.
    """
    table = {_plain(alias): s for s in SAMPLERS for alias in (s.name, *s.aliases)}
    plain = _plain(name)
    if plain in table:
        return table[plain]
    for ending, kind in _KINDS.items():
        stem = plain.removesuffix(ending)
        if stem != plain and stem in table:
            if table[stem].grid.levels in ("whole", "distilled"):
                raise SettingError(
                    f"The sampler {table[stem].name} has timesteps of its own and cannot take "
                    f"{ending} sigmas."
                )
            return dataclasses.replace(table[stem], kind=kind)
    nearest = difflib.get_close_matches(plain, table, n=1, cutoff=0)[0]
    raise SettingError(
        f"There is no sampler {shorten(name)}; the nearest is {table[nearest].name!r}. "
        f"The samplers are {', '.join(sampler.name for sampler in SAMPLERS)}."
    )


def default_sampler(config: DiscreteSchedulerConfig) -> Sampler:
    """Returns the sampler that a checkpoint's `scheduler_config.json` names.

    **Raises:** `ConfigError` where this package does not have it.
    """
    sde = config.algorithm_type == "sde-dpmsolver++"
    if config.scheduler == "DPMSolverMultistepScheduler" and sde:
        return find_sampler("dpmpp-2m-sde")
    for sampler in SAMPLERS:
        if config.scheduler in sampler.aliases:
            return sampler
    raise ConfigError(
        f"The checkpoint's own scheduler, {cut(config.scheduler)}, is not among the samplers; "
        "choose another, such as euler."
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
