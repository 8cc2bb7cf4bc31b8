"""The command that lists what a checkpoint holds."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from .tables import table


if TYPE_CHECKING:
    from eqxdiff.convert.inspect import Portrait


def inspect(
    source: Annotated[
        str, Argument(metavar="SRC", help="A file, folder, Hub repository or REPOSITORY:FILE.")
    ],
    revision: Annotated[
        str | None,
        Option(
            help="Use this branch, tag or commit of the repository.",
            metavar="NAME",
            show_default="main",
        ),
    ] = None,
    pickle: Annotated[
        bool, Option("--pickle", help="Allow pickles: only their tensors are read.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Lists what a checkpoint holds. Of files on the Hub only the headers are fetched."""
    from eqxdiff.convert.inspect import inspect as look

    portrait = look(source, revision=revision, pickle=pickle)
    print(json.dumps(dataclasses.asdict(portrait)) if as_json else describe(portrait))


def describe(portrait: "Portrait") -> str:
    """Returns a portrait in words, in which nothing from a file can control the terminal."""
    from eqxdiff.tensors import printable

    models = f" ({', '.join(portrait.models)})" if portrait.models else ""
    lines = [
        f"model: {portrait.model or 'unknown'}{models}",
        f"layout: {portrait.layout}",
        f"parameters: {portrait.parameters:,}",
        f"bytes: {portrait.nbytes:,}",
        f"dtypes: {counts(portrait.dtypes)}",
        "",
    ]
    rows = [
        (name, f"{part['parameters']:,}", str(part["tensors"]), counts(part["dtypes"]), place(part))
        for name, part in portrait.components.items()
    ]
    rows = [tuple(map(printable, row)) for row in rows]
    lines.append(table(("COMPONENT", "PARAMETERS", "TENSORS", "DTYPES", "LAYOUT"), rows))
    told = [f"missing: {name}" for name in portrait.missing]
    told += [f"extra: {name}" for name in portrait.extra]
    told += [line for problem in portrait.problems for line in problem.split("\n")]
    told += [f"metadata: {key}: {value[:200]}" for key, value in portrait.metadata.items()]
    return "\n".join([*lines, *map(printable, told)])


def counts(dtypes: dict[str, int]) -> str:
    return (
        next(iter(dtypes)) if len(dtypes) == 1 else ", ".join(f"{n} {d}" for d, n in dtypes.items())
    )


def place(part: dict[str, Any]) -> str:
    if "layout" not in part:
        return "diffusers"
    return f"{part['layout']} under {part['prefix']}" if part["prefix"] else part["layout"]
