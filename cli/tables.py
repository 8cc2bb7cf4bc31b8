"""The commands that list what there is."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

from typer import Option


Json = Annotated[bool, Option("--json", help="As a JSON list.")]


def models(as_json: Json = False) -> None:
    """Lists the models."""
    from eqxdiff.models import FAMILIES

    presets = {name: preset for family in FAMILIES for name, preset in family.presets.items()}
    if as_json:
        rows = [
            {
                "name": name,
                "summary": preset.summary,
                "repository": preset.repository,
                "defaults": dataclasses.asdict(preset.defaults),
            }
            for name, preset in presets.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    rows = []
    for name, preset in presets.items():
        own = preset.defaults
        guidance = "none" if own.guidance is None else f"{own.guidance:g}"
        size = f"{own.steps} steps, {own.width}x{own.height}, {own.max_sequence_length} tokens"
        size = f"{size}, guidance {guidance}"
        rows.append((name, preset.summary, preset.repository, size))
    print(table(("NAME", "WHAT", "REPOSITORY", "DEFAULTS"), rows))


def samplers(as_json: Json = False) -> None:
    """Lists the samplers."""
    from eqxdiff.sampling import SAMPLERS

    if as_json:
        rows = [
            {
                "name": sampler.name,
                "aliases": sampler.aliases,
                "summary": sampler.summary,
                "flows": sampler.flow is not None,
            }
            for sampler in SAMPLERS
        ]
        print(json.dumps(rows, indent=2))
        return
    rows = [
        (sampler.name, "yes" if sampler.flow else "no", sampler.summary, ", ".join(sampler.aliases))
        for sampler in SAMPLERS
    ]
    print(table(("NAME", "FLOWS", "WHAT", "ALSO CALLED"), rows))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(lines)
