"""Options of the command line from what the models declare."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from typer import Option

from eqxdiff import SettingError
from eqxdiff.models import Declaration, Settings, declarations, settings_classes

from .order import Order


PER_MODEL = "the model's"
"""The default of an option for which each model has a default of its own."""


def signature() -> inspect.Signature:
    """Makes the signature of `eqxdiff generate`: own options, settings, and parts of models."""
    known = settings_classes()
    parameters = [*_own(), *_settings(known), *_parts(known)]
    panels = ["", "Picture", "Guidance", "Sampling", "Weights", "LoRA", "Memory", "Output"]
    parameters.sort(key=lambda parameter: panels.index(_panel(parameter)))
    return inspect.Signature(parameters)


def split(values: Mapping[str, Any]) -> Order:
    """Makes the order of a command line's values."""
    names = {name for cls in settings_classes() for name in declarations(cls)}
    parts = {name for cls in settings_classes() for name in cls.components}
    own = {n: v for n, v in values.items() if n not in names | parts}
    settings = {n: parse(n, v) for n, v in values.items() if n in names}
    specs = {n: v for n, v in values.items() if n in parts and v is not None}
    return Order(**own, settings=settings, parts=specs)


def parse(name: str, value: Any) -> Any:
    """Reads the value of an option as the setting takes it. **Raises:** `SettingError`."""
    if value is False:
        return None
    form = next(
        declared.form
        for cls in settings_classes()
        for own, declared in declarations(cls).items()
        if own == name
    )
    if form is None or value is None:
        return value
    text = value.strip().lower()
    if form == "WIDTHxHEIGHT" and (match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)):
        return int(match[2]), int(match[1])
    if form == "TOP,LEFT" and (match := re.fullmatch(r"(\d{1,6})\s*,\s*(\d{1,6})", text)):
        return int(match[1]), int(match[2])
    if form == "NUMBERS":
        try:
            return tuple(float(part) for part in text.split(","))
        except ValueError:
            form = "numbers with commas between"
    raise SettingError(f"`{name}` {value} is not understood: write {form}.")


def _own() -> Iterator[inspect.Parameter]:
    for field in dataclasses.fields(Order):
        if field.name not in ("settings", "parts"):
            default = field.default
            if default is dataclasses.MISSING:
                default = inspect.Parameter.empty
            yield _parameter(field.name, field.type, default)


def _settings(known: tuple[type[Settings], ...]) -> Iterator[inspect.Parameter]:
    declared: dict[str, list[tuple[Any, Declaration, Any]]] = {}
    for cls in known:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            own = field.metadata["declaration"]
            declared.setdefault(field.name, []).append((hints[field.name], own, field.default))
    for name, each in declared.items():
        hint, own, default = each[0]
        helps = list(dict.fromkeys(other.help for _, other, _ in each))
        flags = list(dict.fromkeys(flag for _, other, _ in each for flag in other.flags))
        absent = list(dict.fromkeys(other.absent for _, other, _ in each if other.absent))
        names = [spell(name), *(spell(flag) for flag in flags)]
        shown: Any = absent[0] if len(absent) == 1 else PER_MODEL
        if default is False:
            hint, shown = bool, True
        option = Option(
            *names,
            help=helps[0] if len(helps) == 1 else " ".join(helps),
            rich_help_panel=own.panel,
            show_default=shown,
            metavar=own.form,
        )
        yield _parameter(name, Annotated[_type(hint, own), option], False if hint is bool else None)


def _type(hint: Any, declared: Declaration) -> Any:
    """Returns the type of an option for a setting of a type."""
    if hint is bool:
        return bool
    if declared.choices is not None:
        return Literal[declared.choices] | None  # pyright: ignore
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    return (kind if kind in (int, float) else str) | None


def _parts(known: tuple[type[Settings], ...]) -> Iterator[inspect.Parameter]:
    for name in dict.fromkeys(name for cls in known for name in cls.components):
        option = Option(
            spell(name),
            help=f"Another {name}: a file, folder, repository or REPOSITORY:FILE.",
            rich_help_panel="Weights",
            show_default="the model's own",
        )
        yield _parameter(name, Annotated[str | None, option], None)


def spell(name: str) -> str:
    """Spells a name as an option: `--guidance-scale`, or `-g` for a letter."""
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _panel(parameter: inspect.Parameter) -> str:
    (option,) = (each for each in parameter.annotation.__metadata__)
    return getattr(option, "rich_help_panel", None) or ""
