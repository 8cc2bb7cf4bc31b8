"""The commands for LoRAs: what one is, merging it into a model, extracting one from two models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from .helptext import documented
from .signals import SIGNALS
from .tables import table


if TYPE_CHECKING:
    from eqxdiff.lora import Adapter


app = typer.Typer(
    help="Inspects, merges and extracts LoRAs.",
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

Dtype = Literal["float32", "bfloat16", "float16"]
MOST_TARGETS = 40


@app.command()
@documented
def inspect(
    file: Annotated[str, Argument(help="A file, a repository or REPOSITORY:FILE.")],
    revision: Annotated[
        str | None,
        Option(
            help="Use this branch, tag or commit of the repository.",
            metavar="NAME",
            show_default="main",
        ),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON, with every target.")] = False,
) -> None:
    """Shows a LoRA's format, kinds, ranks, alphas and targets, and the model that it is for."""
    from eqxdiff._errors import printable
    from eqxdiff.lora import load

    facts = describe(load(file, revision=revision))
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name in ("name", "format", "base", "kinds", "ranks", "alphas", "dtype", "sha256"):
        value = facts[name]
        if isinstance(value, dict):
            value = ", ".join(f"{key} ({count})" for key, count in value.items()) or "none"
        print(printable(f"{name:<8} {value}"))
    for key, value in facts["metadata"].items():
        text = value if len(value) <= 100 else value[:97] + "..."
        print(f"{'':8} {printable(f'{key}: {text}')}")
    rest = ("rank", "alpha", "shape")
    rows = [
        (printable(t["module"]), t["kind"], *(str(t[key] or "") for key in rest))
        for t in facts["targets"][:MOST_TARGETS]
    ]
    print(table(("TARGET", "KIND", "RANK", "ALPHA", "SHAPE"), rows))
    if len(facts["targets"]) > MOST_TARGETS:
        print(f"and {len(facts['targets']) - MOST_TARGETS} more; --json lists them all")
    for name, why in facts["unread"].items():
        print(printable(f"not read: {name} {why}"))


def describe(adapter: "Adapter") -> dict[str, Any]:
    """Returns all facts about a file that need no model."""
    from collections import Counter

    from eqxdiff.lora import guess_base

    targets = [
        {
            "module": patch.module,
            "kind": patch.kind_name,
            "rank": patch.rank,
            "alpha": patch.alpha,
            "shape": None if patch.shape is None else list(patch.shape),
        }
        for patch in adapter.patches
    ]
    count = lambda values: {str(value): n for value, n in Counter(values).most_common()}
    return {
        "name": adapter.name,
        "format": adapter.format.name,
        "base": guess_base(adapter),
        "kinds": count(target["kind"] for target in targets),
        "ranks": count(t["rank"] for t in targets if t["rank"] is not None),
        "alphas": count(t["alpha"] for t in targets if t["alpha"] is not None),
        "dtype": str(adapter.dtype),
        "sha256": adapter.sha256,
        "metadata": dict(adapter.metadata),
        "targets": targets,
        "unread": dict(adapter.unread),
    }


@app.command()
@documented
def merge(
    model: Annotated[str, Argument(help="The model, such as sdxl; `eqxdiff models` lists them.")],
    output: Annotated[Path, Argument(help="A folder that does not exist yet.")],
    lora: Annotated[
        list[str],
        Option(
            "--lora",
            metavar="SPEC@SCALE",
            help="Merge a LoRA, as for `eqxdiff generate --lora`. May be repeated.",
        ),
    ],
    lora_partial: Annotated[
        bool, Option("--lora-partial", help="Accept LoRAs with tensors that do not fit the model.")
    ] = False,
    weights: Annotated[
        str | None,
        Option(
            help="Read the weights from a folder in the diffusers layout or a Hub repository.",
            metavar="SPEC",
            show_default="the model's own",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        Option(
            help="Use this branch, tag or commit of the repository.",
            metavar="NAME",
            show_default="main",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        Option(help="Write the weights in this type.", show_default="the checkpoint's"),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Writes a model in the diffusers layout with LoRAs in its weights."""
    from eqxdiff._errors import printable
    from eqxdiff.lora.save import save_merged
    from eqxdiff.pipeline import open_model

    plan = open_model(
        model, weights, revision=revision, dtype=dtype, loras=lora, lora_partial=lora_partial
    )
    assert plan.adapters is not None
    reports = plan.adapters.reports
    tables = {name: part.table for name, part in plan.components.items()}
    stages = {name: part.stage for name, part in plan.components.items()}
    configs = {
        name: (plan.parts[name].config() if name in plan.parts else None)
        or plan.source.read_json(f"{name}/config.json")
        for name in plan.components
    }
    with SIGNALS.raised():
        save_merged(plan.source, plan.load, configs, tables, stages, list(plan.tokenizers), output)
    if as_json:
        print(json.dumps({"folder": str(output), "loras": plan.adapters.record()}, indent=2))
        return
    for report in reports:
        print(printable(str(report)))
    print(output)


@app.command()
@documented
def extract(
    model: Annotated[str, Argument(help="The model that both are, such as sdxl.")],
    base: Annotated[str, Argument(help="A folder in the diffusers layout, or a repository.")],
    tuned: Annotated[str, Argument(help="The model made from it: a folder or a repository.")],
    output: Annotated[Path, Argument(help="A .safetensors file that does not exist yet.")],
    rank: Annotated[int, Option(help="The rank of each matrix, at most.")] = 32,
    dtype: Annotated[Dtype, Option(help="Write the tensors in this type.")] = "float16",
    text: Annotated[bool, Option("--text", help="Include the text encoders.")] = False,
    linear_only: Annotated[
        bool,
        Option("--linear-only", help="Leave out biases and norms, which diffusers cannot read."),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Writes the difference of two models as the LoRA of a rank that comes closest to it."""
    import jax.numpy as jnp

    from eqxdiff.checkpoint import read_table
    from eqxdiff.lora import extract as extract_adapter
    from eqxdiff.lora.save import check_new, save_extracted
    from eqxdiff.pipeline import open_model

    check_new(output, ".safetensors")
    plans = [open_model(model, where, dtype=jnp.float32) for where in (base, tuned)]
    names = plans[0].names("denoiser") + (plans[0].names("text") if text else [])
    kept: dict[str, float] = {}
    tensors: dict[str, Any] = {}
    for name in names:  # one component in memory at a time
        before, after = (plan.load([name]) for plan in plans)
        tables = {name: read_table(plans[0].components[name].table)}
        found = extract_adapter(
            before, after, tables, rank=rank, dtype=jnp.dtype(dtype), bias=not linear_only
        )
        tensors |= found.tensors
        kept |= found.kept
    with SIGNALS.raised():
        save_extracted(output, tensors)
    if as_json:
        print(json.dumps({"file": str(output), "rank": rank, "kept": kept}, indent=2))
        return
    print(kept_text(kept))
    print(output)


def kept_text(kept: Mapping[str, float]) -> str:
    """Says which share of the difference an extracted LoRA has."""
    parts = ", ".join(f"{share:.1%} of {name}" for name, share in kept.items())
    return f"of the squared difference it keeps {parts}"
