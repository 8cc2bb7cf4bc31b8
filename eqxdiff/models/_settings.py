"""Settings of a picture: each is declared once, and options, bounds and documentation follow.

Nothing here needs JAX, so that the command line shows its options at once.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from .._config import coerce, spell_type
from .._errors import SettingError


S = TypeVar("S", bound="Settings")

Panel = Literal["Picture", "Guidance", "Sampling", "Memory"]
"""Where the help of the command line shows a setting."""

SPREADS = ("karras", "exponential", "beta", "ays")


@dataclasses.dataclass(frozen=True)
class Declaration:
    """The declaration of a setting besides its name, type and default.

    **Fields:**

    - `help`: what the setting does, in one sentence.
    - `panel`: where the command line shows it.
    - `low`, `high`: the bounds, both included.
    - `choices`: the values that it may have.
    - `flags`: further names on the command line.
    - `absent`: the default where it is no value, in words.
    - `form`: how it is written on the command line: `"WIDTHxHEIGHT"`, `"TOP,LEFT"` or `"NUMBERS"`.
    - `guided`: whether it counts with classifier-free guidance alone.
    - `a1111`: returns the pairs that a picture's `parameters` text has for a value.
    """

    help: str
    panel: Panel
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] | None = None
    flags: tuple[str, ...] = ()
    absent: str | None = None
    form: str | None = None
    guided: bool = False
    a1111: Callable[[Any], Mapping[str, Any]] | None = None


def setting(help: str, panel: Panel, *, default: Any = None, **more: Any) -> Any:
    """A field of a settings class. `more` are fields of `Declaration`."""
    declared = {"declaration": Declaration(help, panel, **more)}
    return dataclasses.field(default=default, metadata=declared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that every model has. `None` is off, or leaves the choice to the model.

    A family's own class adds fields by `setting`. Classes are frozen, so that a setting is changed
    by `dataclasses.replace`.

    - `components`: the folders of the family's components, for each of which the command line has
        an option.
    """

    components: ClassVar[tuple[str, ...]] = ()

    steps: int = setting(
        "The number of denoising steps.",
        "Sampling",
        default=1,
        low=1,
        high=1000,
        flags=("num_inference_steps",),
    )
    height: int = setting(
        "The height of the picture, in pixels.", "Picture", default=1024, low=1, flags=("H",)
    )
    width: int = setting(
        "The width of the picture, in pixels.", "Picture", default=1024, low=1, flags=("W",)
    )
    strength: float | None = setting(
        "How much of the input picture is made anew, from 0 to 1: 1 ignores it.",
        "Picture",
        low=0,
        high=1,
        absent="0.6; 1 with a mask",
        a1111=lambda value: {"Denoising strength": value},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledSettings(Settings):
    """The settings of models whose autoencoder can work tile by tile."""

    vae_tiling: bool = setting(
        "Encode and decode large pictures tile by tile, to save memory.", "Memory", default=False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedSettings(Settings):
    """The settings of models that classifier-free guidance can guide."""

    negative_prompt: str | None = setting(
        "The prompt that classifier-free guidance leads away from.",
        "Guidance",
        flags=("n",),
        absent="none",
        guided=True,
    )
    guidance_rescale: float | None = setting(
        "How far guidance returns to the contrast of the unguided prediction, from 0 to 1.",
        "Guidance",
        low=0,
        high=1,
        absent="0",
        guided=True,
        a1111=lambda value: {"CFG Rescale phi": value},
    )
    guidance_start: float | None = setting(
        "The part of all steps, from 0 to 1, after which guidance begins to act.",
        "Guidance",
        low=0,
        high=1,
        absent="0",
        guided=True,
    )
    guidance_end: float | None = setting(
        "The part of all steps, from 0 to 1, after which guidance no longer acts.",
        "Guidance",
        low=0,
        high=1,
        absent="1",
        guided=True,
    )
    sequential_guidance: bool = setting(
        "Guide by two calls of the network on one example each, to save memory.",
        "Memory",
        default=False,
        guided=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledSettings(Settings):
    """The settings of models whose sampler and noise levels can be chosen."""

    sampler: str | None = setting(
        "The sampler; `eqxdiff samplers` lists them.", "Sampling", absent="the checkpoint's"
    )
    schedule: str | None = setting(
        "How the noise levels are spread between the largest and the smallest.",
        "Sampling",
        choices=SPREADS,
        absent="the checkpoint's",
    )
    sigmas: tuple[float, ...] | None = setting(
        "The noise levels themselves, falling, as in 14.6,3.9,0.9.",
        "Sampling",
        form="NUMBERS",
        absent="the schedule's",
    )


def declarations(cls: type[Settings]) -> dict[str, Declaration]:
    """What is declared of each setting of a class, by name."""
    return {field.name: field.metadata["declaration"] for field in dataclasses.fields(cls)}


def own_names(cls: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by their own names where some are given by further ones, such as
    `num_inference_steps`.

    **Raises:** `SettingError` where a setting is given by two names.
    """
    own = {flag: name for name, each in declarations(cls).items() for flag in each.flags}
    named: dict[str, Any] = {}
    for name, value in given.items():
        meant = own.get(name, name)
        if named.get(meant) is not None and value is not None:
            raise SettingError(f"`{name}` is another name of `{meant}`: give one of them.")
        if value is not None or meant not in named:
            named[meant] = value
    return named


def complete(cls: type[S], given: Mapping[str, Any], defaults: S, model: str) -> S:
    """Completes the settings that a user gave by the defaults for those absent or `None`.

    Numbers of NumPy and JAX count as those of Python.

    **Raises:** `SettingError` for a setting that the model does not have, that is not of its type,
    not finite, out of bounds or not among its choices.
    """
    hints, declared = typing.get_type_hints(cls), declarations(cls)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in declared:
            near = difflib.get_close_matches(name, declared, 1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            takes = ", ".join(f"`{own}`" for own in sorted(declared))
            raise SettingError(f"{model} would ignore `{name}`.{hint} It takes {takes}.")
        values[name] = _checked(name, value, hints[name], declared[name])
    if "sigmas" in values and "steps" not in values:
        values["steps"] = len(values["sigmas"]) - (values["sigmas"][-1:] == (0.0,))
    return dataclasses.replace(defaults, **values)


def _checked(name: str, value: Any, hint: Any, declared: Declaration) -> Any:
    if getattr(value, "shape", None) is not None:
        value = value.tolist()  # of NumPy or JAX
    if isinstance(value, list):
        value = tuple(value)
    try:
        value = coerce(value, hint)
    except (TypeError, ValueError):
        kind = spell_type(hint).removesuffix(" | None")
        raise SettingError(f"`{name}` {value!r} is not of type {kind}.") from None
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise SettingError(f"`{name}` {number} is not a finite number.")
    if isinstance(value, int | float):
        check_range(name, value, declared.low, declared.high)
    if declared.choices is not None:
        check_choice(name, str(value), declared.choices)
    return value


def check_guided(given: Mapping[str, Any], cls: type[Settings], model: str, scale: str) -> None:
    """Refuses the settings that count with classifier-free guidance alone, which is off.

    **Arguments:**

    - `scale`: the name of the setting that turns guidance on.

    **Raises:** `SettingError`.
    """
    for name, declared in declarations(cls).items():
        value = given.get(name)
        if declared.guided and value is not None and value is not False:
            raise SettingError(
                f"{model} would ignore `{name}` without classifier-free guidance: "
                f"give `{scale}` above 1."
            )


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
        raise SettingError(f"`{name}` {value} is out of range: it is {bounds}.")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """**Raises:** `SettingError` where a setting is not among `choices`."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1, cutoff=0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SettingError(f"`{name}` {value!r} is not one of {', '.join(choices)}.{hint}")


def image_step(settings: Settings, *, floor: bool = True) -> int:
    """The step that a picture made from another begins with: 0 where all is made anew.

    **Arguments:**

    - `floor`: whether the number of steps that are left is rounded down, as diffusers does for
        Stable Diffusion, rather than the number of those left out, as it does for FLUX.1.

    **Raises:** `SettingError` where no step is left.
    """
    strength = 1.0 if settings.strength is None else settings.strength
    steps = settings.steps
    first = steps - int(steps * strength) if floor else int(steps - steps * strength)
    if first >= steps:
        raise SettingError(
            f"`strength` {strength:g} leaves none of {steps} steps: raise it, or `steps`."
        )
    return first


def tiles(settings: Settings) -> bool:
    """Returns whether the autoencoder works tile by tile."""
    return isinstance(settings, TiledSettings) and settings.vae_tiling


def applied(settings: Settings) -> dict[str, Any]:
    """The settings that are in force, by name."""
    fields = dataclasses.asdict(settings).items()
    return {name: value for name, value in fields if value is not None and value is not False}
