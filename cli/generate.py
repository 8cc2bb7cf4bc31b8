"""The command `eqxdiff generate`: it makes its options when it is called, and runs `job`."""

from collections.abc import Callable
from typing import Any

from .progress import JsonReport, TextReport


HELP = "Makes pictures from prompts."


def generate() -> None:
    """Stands for the command where another one is called, so that no options need be made."""


def command() -> Callable[..., None]:
    """Makes the command, whose options come from the settings of the models."""
    from .options import signature, split

    def generate(**values: Any) -> None:
        from .job import run  # which imports JAX

        order = split(values)
        report = JsonReport(order.quiet) if order.as_json else TextReport(order.quiet)
        try:
            run(order, report)
        finally:
            report.close()

    generate.__signature__ = signature()  # pyright: ignore[reportFunctionMemberAccess]
    return generate
