"""The command that compiles the programs of a picture ahead of time."""

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from .helptext import parameter


HELP = "Compiles the programs of a picture into a file, which `generate --compiled` runs."

KEPT = {"model", "weights", "revision", "dtype", "compute_dtype", "lora", "lora_partial"}
KEPT |= {"lora_mode", "batch_size", "attention", "attention_blocks", "overwrite"}
"""The options of `eqxdiff generate` that count here, besides settings and parts."""

OWN: dict[str, Any] = {
    "output": Annotated[
        Path, Option("--output", "-o", help="Write the programs to this file.", metavar="FILE")
    ],
    "platform": Annotated[
        Literal["cpu", "cuda", "rocm", "tpu"] | None,
        Option(help="Compile for this platform", show_default="that of this machine"),
    ],
}


REQUIRED = inspect.Parameter.empty
DEFAULTS = {"platform": None}


def compile() -> None:
    """Stands for the command where another one is called, so that no options need be made."""


def command() -> Callable[..., None]:
    """Makes the command, whose options come from the settings of the models."""
    from .options import signature, split
    from .order import Order

    orders = set(Order.__dataclass_fields__) - KEPT
    kept = [one for one in signature().parameters.values() if one.name not in orders]
    more = []
    for name, annotated in OWN.items():
        hint, option = typing.get_args(annotated)
        more.append(parameter(name, hint, option, DEFAULTS.get(name, REQUIRED)))

    def compile(*, output: Path, platform: str | None, **values: Any) -> None:
        from .job import compile_order  # which imports JAX

        compile_order(split(values), output, platform)

    compile.__signature__ = inspect.Signature([*kept, *more])  # pyright: ignore
    return compile
