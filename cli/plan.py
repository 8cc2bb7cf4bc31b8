"""The command that says what a picture needs, and whether it fits, before anything is read."""

import json
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from .order import Dtype
from .tables import table


if TYPE_CHECKING:
    from eqxdiff.plan import Forecast


def plan(
    model: Annotated[str, Argument(help="The name of a model, such as flux-dev.")],
    target: Annotated[
        str | None,
        Option(
            help="Plan for these devices: v5e-4, v6e-8, v5p-8, h100, h200, a100, rtx4090 or cpu; "
            "another number may stand after each.",
            metavar="NAME",
            show_default="this machine",
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        Option(
            help="Spread the work over devices along the axes cfg, data, fsdp, context and tensor, "
            "as in data=4,fsdp=2; auto takes the fastest that fits.",
            metavar="AXES",
            show_default="one device",
        ),
    ] = None,
    size: Annotated[
        str | None,
        Option(help="The size of the pictures.", metavar="WxH", show_default="the model's"),
    ] = None,
    steps: Annotated[
        int | None, Option(help="The number of denoising steps.", show_default="the model's")
    ] = None,
    batch_size: Annotated[
        int | None,
        Option(
            "--batch",
            "--batch-size",
            help="Make this many pictures at once.",
            show_default="1, or 1 for each part of a batch on --mesh",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, Option(help="Keep the weights in this type.", show_default="the checkpoint's")
    ] = None,
    compute_dtype: Annotated[
        Dtype | None,
        Option(
            help="Keep the activations in this type.",
            show_default="float32 on a CPU, bfloat16 elsewhere",
        ),
    ] = None,
    release: Annotated[
        Literal["text"] | None,
        Option(help="Encode all prompts first, then drop the text encoders.", show_default="off"),
    ] = None,
    vae_tiling: Annotated[
        bool, Option("--vae-tiling", help="Decode the pictures tile by tile.")
    ] = False,
    sequential_guidance: Annotated[
        bool, Option("--sequential-guidance", help="Guide by two calls of the network.")
    ] = False,
    train: Annotated[
        Literal["lora"] | None,
        Option(help="Plan the training of a LoRA in place of pictures.", show_default="off"),
    ] = None,
    weights: Annotated[
        str | None,
        Option(
            help="Read the configs and headers of these files.",
            metavar="SPEC",
            show_default="the sizes that the package knows",
        ),
    ] = None,
    formula: Annotated[
        bool,
        Option("--formula", help="Ask no compiler, which takes minutes, but estimate the memory."),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Says what a picture needs and whether it fits: from shapes alone, without weights."""
    from eqxdiff import SettingError
    from eqxdiff.plan import Wish, describe, look_ahead

    settings: dict[str, Any] = {"steps": steps}
    if size is not None:
        sides = size.lower().split("x")
        if len(sides) != 2 or not all(side.isdigit() for side in sides):
            raise SettingError(f"`size` {size} is not understood: write WIDTHxHEIGHT.")
        settings |= {"width": int(sides[0]), "height": int(sides[1])}
    settings |= {
        "vae_tiling": vae_tiling or None,
        "sequential_guidance": sequential_guidance or None,
    }
    wish = Wish(
        model,
        {name: value for name, value in settings.items() if value is not None},
        target=target,
        mesh=mesh,
        batch_size=batch_size,
        dtype=dtype,
        compute_dtype=compute_dtype,
        keep="nowhere" if release else "device",
        train=train,
        weights=weights,
        formula=formula,
    )
    note = lambda text: print(text, file=sys.stderr)
    found, advice = look_ahead(wish, note)
    facts = describe(found, advice)
    print(json.dumps(facts, indent=2) if as_json else spell_out(found, facts))


def spell_out(found: "Forecast", facts: dict[str, Any]) -> str:
    """Returns a plan as tables."""
    gib = lambda n: f"{n / 2**30:.2f}"
    lines = [
        f"{facts['model']} on {facts['target']} ({facts['devices']} x {facts['chip']}), "
        f"mesh {facts['mesh']}, {facts['work']}",
        "",
    ]
    rows = [
        (c["name"], f"{c['parameters']:,}", c["dtype"], gib(c["bytes"]), gib(c["device_bytes"]))
        for c in facts["components"]
    ]
    lines.append(table(("COMPONENT", "PARAMETERS", "DTYPE", "GIB", "GIB/DEVICE"), rows))
    rows = [
        (
            p["name"],
            str(p["calls"]),
            f"{p['operations'] / 1e12:.3f}",
            f"{p['moved_bytes'] / 1e9:.2f}",
            f"{p['collective_bytes'] / 1e9:.3f}",
            gib(p["argument_bytes"]),
            gib(p["temporary_bytes"]),
            f"{1e3 * p['seconds']:.2f}",
            p["bound"],
        )
        for p in facts["programs"]
    ]
    head = (
        "PROGRAM",
        "CALLS",
        "TFLOP",
        "GB MOVED",
        "GB LINKS",
        "GIB ARGS",
        "GIB TEMP",
        "MS",
        "BOUND",
    )
    lines += ["", table(head, rows), ""]
    lines.append(f"peak memory of a device: {gib(facts['peak_bytes'])} GiB ({facts['source']})")
    lines.append(f"memory of a device: {gib(facts['memory_bytes'])} GiB")
    lines.append(f"time by the roofline: {facts['seconds']:.3g} s")
    peaks = facts["assumes"]
    lines.append(
        f"assumes: {peaks['bfloat16_tflops']:g} TFLOP/s in bfloat16, "
        f"{peaks['float32_tflops']:g} in float32, {peaks['memory_gb_per_s']:g} GB/s of memory, "
        f"{peaks['link_gb_per_s']:g} GB/s of links, all at their peaks and at the same time"
    )
    flags = re.sub(r"`(\w+)`", lambda name: f"--{name[1].replace('_', '-')}", str(facts["advice"]))
    lines.append("It fits." if facts["fits"] else f"It does not fit. {flags}")
    return "\n".join(lines)
