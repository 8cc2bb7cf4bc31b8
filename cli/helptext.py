"""The documentation of options in the help: the form of a value, its choices and its default."""

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from typer.models import ArgumentInfo


Command = TypeVar("Command", bound=Callable[..., None])

FORMS = {bool: "", int: "INT", float: "FLOAT", Path: "FILE", str: "TEXT"}
"""The form of a value in the help, by its type."""

EMPTY = (inspect.Parameter.empty, dataclasses.MISSING)


def documented(command: Command) -> Command:
    """Documents the options of a command in its signature, and returns the command."""
    each = []
    for own in inspect.signature(command).parameters.values():
        hint, option = typing.get_args(own.annotation)
        each.append(parameter(own.name, hint, option, own.default))
    command.__signature__ = inspect.Signature(each)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def parameter(name: str, hint: Any, option: Any, default: Any) -> inspect.Parameter:
    """Makes a parameter of a command whose option is documented.

    **Arguments:**

    - `option`: an option or argument of Typer. Its `show_default` may say the default in words.
    """
    kind, option = inspect.Parameter.KEYWORD_ONLY, copy.copy(option)
    if default in EMPTY:
        default = inspect.Parameter.empty
    if isinstance(option, ArgumentInfo):
        return inspect.Parameter(name, kind, annotation=Annotated[hint, option], default=default)
    kinds = _flat(hint)
    choices = [each for each in kinds if isinstance(each, str)]
    if choices:
        option.metavar = choices[0] if len(choices) == 1 else "NAME"
    elif option.metavar is None:
        option.metavar = FORMS[kinds[0]]
    if len(choices) > 1:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        option.help = f"{option.help.removesuffix('.')}: {listed}."
    told = option.show_default if isinstance(option.show_default, str) else _spell(default)
    if not option.hidden and told is not None:
        option.help = f"{option.help} [default: {told}]"
    option.show_default = False
    return inspect.Parameter(name, kind, annotation=Annotated[hint, option], default=default)


def _spell(default: Any) -> str | None:
    """Spells a default, where there is one."""
    if default is False:
        return "off"
    if default is None or default in EMPTY:
        return None
    return f"{default:g}" if isinstance(default, float) else str(default)


def _flat(hint: Any) -> list[Any]:
    """Lists the types and values that a type is made of, but for `None`."""
    args = typing.get_args(hint)
    if not args:
        return [] if hint is type(None) else [hint]
    return [each for arg in args for each in _flat(arg)]
