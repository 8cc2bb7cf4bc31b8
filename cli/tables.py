"""The commands that list the models and the samplers."""

import json
from collections.abc import Sequence
from typing import Annotated

from typer import Option


Json = Annotated[bool, Option("--json", help="Print a JSON list.")]


def models(as_json: Json = False) -> None:
    """Lists the models, and the settings that each takes."""
    from eqxdiff.models import applied, declarations, families

    presets = {name: (f, preset) for f in families() for name, preset in f.presets.items()}
    if as_json:
        rows = [
            {
                "name": name,
                "summary": preset.summary,
                "repository": preset.repository,
                "parts": dict(preset.parts),
                "defaults": applied(preset.defaults),
                "steps": list(preset.distilled) or None,
                "takes": sorted(declarations(family.settings)),
                "controls": dict(preset.controls),
            }
            for name, (family, preset) in presets.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    rows = []
    for name, (_, preset) in presets.items():
        own = applied(preset.defaults)
        steps = "/".join(map(str, preset.distilled)) or own["steps"]
        size = f"{own.pop('width')}x{own.pop('height')}"
        own = {key: value for key, value in own.items() if key != "steps"}
        others = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in own.items())
        defaults = f"{steps} steps, {size}" + (f", {others}" if others else "")
        rows.append((name, preset.summary, preset.repository, defaults))
    print(table(("NAME", "WHAT", "REPOSITORY", "DEFAULTS"), rows))
    for family in families():
        options = ", ".join(sorted(n.replace("_", "-") for n in declarations(family.settings)))
        controls = sorted({name for preset in family.presets.values() for name in preset.controls})
        print(f"\n{', '.join(family.presets)} take:\n  {options}")
        if controls:
            print(f"  control: {', '.join(controls)}, or any repository or folder")


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
    """Lays out rows in columns that are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(lines)
