"""Strict reading of the checkpoints' own JSON configs into frozen dataclasses."""

import dataclasses
import enum
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ._errors import ConfigError


T = TypeVar("T")

SHOWN = 12
"""The most problems that one error lists."""


def parse_config(
    cls: type[T],
    fields: Mapping[str, Any],
    *,
    name: str,
    supported: Mapping[str, Collection[Any]] = types.MappingProxyType({}),
    ignored: Collection[str] = (),
) -> T:
    """Reads a JSON object into the frozen dataclass `cls`, leaving nothing unexplained.

    Each key must be a field of `cls`; or a key of `supported`, with one of the values that the code
    computes; or in `ignored`, because it changes nothing; or start with an underscore. A field
    without a default must be present.

    **Arguments:**

    - `cls`: a frozen dataclass of numbers, strings, booleans, enums, and tuples of those.
    - `fields`: the JSON object.
    - `name`: what the errors call the config, such as `"transformer/config.json"`.
    - `supported`: key -> the values that the code computes. A list in the JSON counts as a tuple.
    - `ignored`: keys that change nothing.

    **Raises:** `ConfigError`, one message that lists the offending keys.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore
    values, problems = {}, []
    for key, value in fields.items():
        value = _freeze(value)
        if key in known:
            try:
                values[key] = coerce(value, hints[key])
            except (TypeError, ValueError):
                problems.append(f"{key}: {shorten(value)} is not of type {spell_type(hints[key])}")
        elif key in supported:
            if value not in supported[key]:
                choices = " or ".join(repr(choice) for choice in supported[key])
                problems.append(f"{key}: {shorten(value)} is not supported, only {choices}")
        elif key not in ignored and not key.startswith("_"):
            problems.append(f"{cut(key)}: an unknown field (its value is {shorten(value)})")
    for key, field in known.items():
        required = field.default is dataclasses.MISSING
        if required and field.default_factory is dataclasses.MISSING and key not in fields:
            problems.append(f"{key}: missing")
    if not problems:
        try:
            return cls(**values)
        except ValueError as error:  # raised by the dataclass's own __post_init__
            problems.append(cut(str(error), 200))
    header = f"{name} does not describe a model that this code computes:"
    if len(problems) > SHOWN:
        problems[SHOWN - 1 :] = [f"and {len(problems) - SHOWN + 1} more"]
    raise ConfigError("\n  ".join([header, *problems]))


def shorten(value: Any) -> str:
    """Returns a value as an error shows it: its `repr`, of at most 80 characters."""
    return cut(repr(value))


def cut(text: str, length: int = 80) -> str:
    """Returns printable text of at most `length` characters."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list) else value


def coerce(value: Any, hint: Any) -> Any:
    """Returns the value as the type `hint`: an int as a float, a tuple item by item, an enum.

    **Raises:** `TypeError` or `ValueError` where the value is of another type, or does not fit it.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for arg in args:
            try:
                return coerce(value, arg)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is tuple:
        if not isinstance(value, tuple):
            raise TypeError
        if len(args) == 2 and args[1] is ...:
            return tuple(coerce(v, args[0]) for v in value)
        if len(args) != len(value):
            raise TypeError
        return tuple(coerce(v, arg) for v, arg in zip(value, args, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError("too large") from None
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if type(value) is not hint:  # not isinstance: True is no integer
        raise TypeError
    return value


def spell_type(hint: Any) -> str:
    """Returns a type as an error names it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
