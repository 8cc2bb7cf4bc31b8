import dataclasses
import difflib
import math
import typing
from collections.abc import Collection, Mapping
from typing import Any

from .._config import coerce, spell_type
from .._errors import SettingError


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a picture is made with. `None` is off, or the same as the first.

    **Fields:**

    - `steps`: denoising steps.
    - `height`, `width`: of the image, in pixels.
    - `max_sequence_length`: tokens of the prompt that the model sees.
    - `prompt_2`: the prompt for the second text encoder.
    - `negative_prompt`, `negative_prompt_2`: what classifier-free guidance leads away from.
    - `guidance`: the scale of the model's own guidance, embedded or classifier-free.
    - `cfg`: the scale of classifier-free guidance for a model that also embeds guidance.
    - `sampler`: the name of a solver.
    - `shift`: the static shift of a flow schedule, in place of the checkpoint's.
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
    sampler: str | None = None
    shift: float | None = None


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
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(f"{option(name)} {value} is not a finite number.")
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
