import dataclasses
import difflib
import math
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from .._config import coerce, spell_type
from .._errors import SettingError
from ..sampling import find_sampler
from ..sampling.spacing import Spacing


SPACINGS = ("karras", "exponential", "beta", "ays")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a picture is made with. `None` is off, or as the model or another setting says.

    **Fields:**

    - `steps`: denoising steps.
    - `height`, `width`: of the image, in pixels.
    - `max_sequence_length`: tokens of the prompt that the model sees.
    - `prompt_2`: the prompt for the second text encoder.
    - `negative_prompt`, `negative_prompt_2`: what classifier-free guidance leads away from.
    - `guidance`: the scale of the model's own guidance, embedded or classifier-free.
    - `cfg`: the scale of classifier-free guidance for a model that also embeds guidance.
    - `guidance_rescale`: how far guidance goes back to the contrast of the unguided prediction,
        from 0 to 1.
    - `sequential_guidance`: whether classifier-free guidance calls the network twice on one example
        each instead of once on two, to save memory.
    - `clip_skip`: how many of CLIP's last layers are left out, besides those that the model always
        leaves out.
    - `sampler`: the name of a solver.
    - `schedule`: how the noise levels are spread: `"karras"`, `"exponential"`, `"beta"` or `"ays"`.
    - `sigmas`: the noise levels themselves, falling, as sigma / alpha.
    - `timestep_spacing`: `"leading"`, `"trailing"` or `"linspace"`, in place of the checkpoint's.
    - `eta`: DDIM's share of new noise.
    - `prediction_type`: what the network predicts, in place of what the checkpoint says:
        `"epsilon"`, `"v_prediction"` or `"sample"`.
    - `shift`: the static shift of a flow schedule, in place of the checkpoint's.
    - `original_size`, `target_size`: height and width that the model is told the picture once had,
        and has; `crop`: the top and left of what was cut off. By default the picture's size, uncut.
    - `negative_original_size`, `negative_crop`, `negative_target_size`: the same for what guidance
        leads away from.
    - `vae_tiling`: whether to decode large pictures tile by tile, to save memory.
    """

    steps: int
    height: int
    width: int
    max_sequence_length: int = 77
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    guidance: float | None = None
    cfg: float | None = None
    guidance_rescale: float | None = None
    sequential_guidance: bool | None = None
    clip_skip: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    sigmas: tuple[float, ...] | None = None
    timestep_spacing: str | None = None
    eta: float | None = None
    prediction_type: str | None = None
    shift: float | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    vae_tiling: bool | None = None


def option(name: str) -> str:
    """A setting as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def complete(
    given: Mapping[str, Any], defaults: Settings, honoured: Collection[str], model: str
) -> Settings:
    """The settings that a user gave, and the defaults for those that are absent or `None`.

    **Raises:** `SettingError` for a setting that does not exist, that the model would ignore
    because it is not among `honoured`, or that is not of its type or not finite.
    """
    given = {name: value for name, value in given.items() if value is not None}
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    hints = typing.get_type_hints(Settings)
    names = [field.name for field in dataclasses.fields(Settings)]
    for name, value in list(given.items()):
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingError(f"There is no setting called {name}.{hint}")
        if name not in honoured:
            known = ", ".join(sorted(honoured))
            raise SettingError(f"{model} would ignore {option(name)}. It takes {known}.")
        try:
            given[name] = value = coerce(value, hints[name])
        except (TypeError, ValueError):
            kind = spell_type(hints[name])
            raise SettingError(f"{option(name)} {value!r} is not of type {kind}.") from None
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise SettingError(f"{option(name)} {number} is not a finite number.")
    if "sigmas" in given and "steps" not in given:
        given["steps"] = len(given["sigmas"]) - (given["sigmas"][-1:] == (0.0,))
    return dataclasses.replace(defaults, **given)


def check_size(settings: Settings, multiple: int) -> None:
    """**Raises:** `SettingError` where a side is not a positive multiple of `multiple`."""
    for name, value in (("height", settings.height), ("width", settings.width)):
        if value < multiple or value % multiple:
            below = max(value // multiple, 1) * multiple
            choices = sorted({below, (max(value, 0) // multiple + 1) * multiple})
            nearest = " or ".join(str(choice) for choice in choices)
            raise SettingError(
                f"The {name} {value} is not a multiple of {multiple}: use {nearest}."
            )


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """**Raises:** `SettingError` where a setting lies outside `low` to `high`."""
    if not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise SettingError(f"{option(name)} {value} is out of range: it is {bounds}.")


def check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    """**Raises:** `SettingError` where a setting is given and not among `choices`."""
    if value is not None and value not in choices:
        near = difflib.get_close_matches(value, choices, 1, cutoff=0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SettingError(f"{option(name)} {value!r} is not one of {', '.join(choices)}.{hint}")


def spacing(settings: Settings) -> Spacing | Literal["ays"] | None:
    """How to spread the noise levels: what `schedule` or the end of the sampler's name says.

    **Raises:** `SettingError` where there is no such sampler or spread, or the two disagree.
    """
    named = None if settings.sampler is None else find_sampler(settings.sampler).kind
    check_choice("schedule", settings.schedule, SPACINGS)
    if settings.schedule is None:
        return named
    if named not in (None, settings.schedule):
        raise SettingError(
            f"The sampler {settings.sampler!r} says {named} and --schedule {settings.schedule}."
        )
    if settings.sigmas is not None:
        raise SettingError("--sigmas are the noise levels themselves: give no --schedule.")
    return typing.cast("Spacing", settings.schedule)
