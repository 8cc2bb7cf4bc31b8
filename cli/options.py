"""Options of the command line from the declarations of the models."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from typer import Option

from eqxdiff import SettingError
from eqxdiff.models import Declaration, Settings, declarations, settings_classes

from .helptext import parameter
from .order import Order


PANELS = ("Picture", "Guidance", "Sampling", "Weights", "LoRA", "Memory", "Processes", "Output")
"""The panels of the help, in order."""

PER_MODEL = "the model's"
"""The default of an option for which each model has a default of its own."""

SHORT = {"WIDTHxHEIGHT": "WxH"}
"""Forms of values that would take too much of the help's width."""


def signature() -> inspect.Signature:
    """Makes the signature of `eqxdiff generate`: own options, settings, and parts of models."""
    known = settings_classes()
    parameters = [*_own(), *_settings(known), *_parts(known)]
    parameters.sort(key=lambda each: ("", *PANELS).index(_panel(each)))
    return inspect.Signature(parameters)


def split(values: Mapping[str, Any]) -> Order:
    """Makes the order of a command line's values.

    **Raises:** `SettingError` where a value is not understood or a setting is given twice.
    """
    known = settings_classes()
    declared = {name: own for cls in known for name, own in declarations(cls).items()}
    parts = {name for cls in known for name in cls.components}
    values = dict(values)
    for alias, name in aliases(known).items():
        value = values.pop(alias)
        if value is not None:
            if values[name] is not None:
                raise SettingError(f"`{alias}` is another name of `{name}`: give one of them.")
            values[name] = value
    own = {n: v for n, v in values.items() if n not in parts and n not in declared}
    settings = {n: parse(n, v, declared[n].form) for n, v in values.items() if n in declared}
    specs = {n: v for n, v in values.items() if n in parts and v is not None}
    return Order(**own, settings=settings, parts=specs)


def aliases(known: tuple[type[Settings], ...]) -> dict[str, str]:
    """Returns the further long names of settings, each with the setting's own."""
    return {
        flag: name
        for cls in known
        for name, declared in declarations(cls).items()
        for flag in declared.flags
        if len(flag) > 1
    }


def parse(name: str, value: Any, form: str | None) -> Any:
    """Reads the value of an option as the setting takes it. **Raises:** `SettingError`."""
    if value is False:
        return None
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
            hint, option = typing.get_args(field.type)
            yield parameter(field.name, hint, option, field.default)


def _settings(known: tuple[type[Settings], ...]) -> Iterator[inspect.Parameter]:
    declared: dict[str, list[tuple[Any, Declaration, Any]]] = {}
    for cls in known:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            own = field.metadata["declaration"]
            declared.setdefault(field.name, []).append((hints[field.name], own, field.default))
    others = aliases(known)
    for name, each in declared.items():
        hint, own, default = each[0]
        hint = bool if default is False else _type(hint, own)
        also = [alias for alias, meant in others.items() if meant == name]
        helps = list(dict.fromkeys(other.help for _, other, _ in each))
        helps += [f"Also {spell(alias)}." for alias in also]
        letters = dict.fromkeys(f for _, other, _ in each for f in other.flags if f not in also)
        absent = list(dict.fromkeys(other.absent for _, other, _ in each if other.absent))
        option = Option(
            *(spell(each) for each in (name, *letters)),
            help=" ".join(helps),
            rich_help_panel=own.panel,
            show_default=default is False or (absent[0] if len(absent) == 1 else PER_MODEL),
            metavar=SHORT.get(own.form or "", own.form),
        )
        yield parameter(name, hint, option, False if hint is bool else None)
        for alias in also:
            yield parameter(alias, hint, Option(spell(alias), hidden=True), None)


def _type(hint: Any, declared: Declaration) -> Any:
    """Returns the type of an option for a setting of a type."""
    if declared.choices is not None:
        return Literal[declared.choices] | None  # pyright: ignore
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    return (kind if kind in (int, float) else str) | None


def _parts(known: tuple[type[Settings], ...]) -> Iterator[inspect.Parameter]:
    for name in dict.fromkeys(name for cls in known for name in cls.components):
        option = Option(
            spell(name),
            help=f"Read the {name} from a file, folder, repository or REPOSITORY:FILE.",
            rich_help_panel="Weights",
            show_default="the model's own",
            metavar="SPEC",
        )
        yield parameter(name, str | None, option, None)


def spell(name: str) -> str:
    """Spells a name as an option: `--guidance-scale`, or `-g` for a letter."""
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"


def _panel(own: inspect.Parameter) -> str:
    (option,) = own.annotation.__metadata__
    return getattr(option, "rich_help_panel", None) or ""
