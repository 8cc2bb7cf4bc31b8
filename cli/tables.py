"""The commands that list what there is."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option


if TYPE_CHECKING:
    from eqxdiff.models import Settings


Json = Annotated[bool, Option("--json", help="As a JSON list.")]


def models(as_json: Json = False) -> None:
    """Lists the models."""
    from eqxdiff.models import FAMILIES

    presets = {
        name: (family, preset) for family in FAMILIES for name, preset in family.presets.items()
    }
    if as_json:
        rows = [
            {
                "name": name,
                "summary": preset.summary,
                "repository": preset.repository,
                "parts": dict(preset.parts),
                "defaults": settings(preset.defaults),
                "steps": list(preset.distilled) or None,
                "takes": sorted(family.honoured),
                "controls": dict(preset.controls),
            }
            for name, (family, preset) in presets.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    rows = []
    for name, (_, preset) in presets.items():
        own = preset.defaults
        scale = own.guidance if own.cfg is None else own.cfg
        guidance = "none" if scale is None else f"{scale:g}"
        steps = "/".join(map(str, preset.distilled)) or own.steps
        size = f"{steps} steps, {own.width}x{own.height}, {own.max_sequence_length} tokens"
        rows.append((name, preset.summary, preset.repository, f"{size}, guidance {guidance}"))
    print(table(("NAME", "WHAT", "REPOSITORY", "DEFAULTS"), rows))
    for family in FAMILIES:
        options = ", ".join(sorted(name.replace("_", "-") for name in family.honoured))
        controls = sorted({name for preset in family.presets.values() for name in preset.controls})
        print(f"\n{', '.join(family.presets)} take:\n  {options}")
        if controls:
            print(f"  control: {', '.join(controls)}, or any repository or folder")


def settings(defaults: "Settings") -> dict[str, Any]:
    """Those that are in force."""
    return {name: v for name, v in dataclasses.asdict(defaults).items() if v is not None}


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
