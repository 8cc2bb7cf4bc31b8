"""From settings to the parts of a recipe that families share."""

from typing import Literal, cast

import jax.numpy as jnp

from .._errors import SettingError
from ..sampling import ClassifierFree, Interval, Schedule, find_sampler
from ..sampling.spacing import Spacing
from ._settings import GuidedSettings, SampledSettings


def spread(settings: SampledSettings) -> Spacing | Literal["ays"] | None:
    """How to spread the noise levels: what `schedule` or the end of the sampler's name says.

    **Raises:** `SettingError` where there is no such sampler or spread, or the two disagree.
    """
    named = None if settings.sampler is None else find_sampler(settings.sampler).kind
    if settings.schedule is None:
        return named
    if named not in (None, settings.schedule):
        raise SettingError(
            f"The sampler {settings.sampler!r} says {named} and `schedule` {settings.schedule}."
        )
    if settings.sigmas is not None:
        raise SettingError("`sigmas` are the noise levels themselves: give no `schedule`.")
    return cast("Spacing", settings.schedule)


def guider_of(settings: GuidedSettings, scale: float | None, schedule: Schedule) -> ClassifierFree:
    """Makes the guider of classifier-free guidance, whose numbers are traced.

    **Arguments:**

    - `schedule`: of the steps that are made, over which the interval of guidance is laid.

    **Raises:** `SettingError` where guidance would act on no step.
    """
    start, end = settings.guidance_start, settings.guidance_end
    interval = Interval.over(schedule, start or 0.0, 1.0 if end is None else end, name="Guidance")
    rescale = settings.guidance_rescale or None
    return ClassifierFree(
        jnp.asarray(scale, jnp.float32),
        None if rescale is None else jnp.asarray(rescale, jnp.float32),
        interval,
        settings.sequential_guidance,
    )
