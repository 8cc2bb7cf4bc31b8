"""The options of `eqxdiff bulk`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .order import Dtype


def bulk(
    model: Annotated[str, Argument(help="The name of a model; `eqxdiff models` lists them.")],
    prompts: Annotated[
        Path,
        Option(
            help="Read the prompts from a .parquet or .jsonl file with a column prompt, and "
            "perhaps seed and settings of the model.",
        ),
    ],
    output: Annotated[
        Path,
        Option("--output", "-o", help="Write pictures and index to this folder of all machines."),
    ],
    workers: Annotated[int, Option(help="Run this many actors.", min=1)] = 1,
    gpus: Annotated[float, Option(help="Give each actor this many GPUs.", min=0)] = 0,
    cpus: Annotated[float, Option(help="Give each actor this many CPUs.", min=0)] = 1,
    batch_size: Annotated[int, Option(help="Make this many pictures at once.", min=1)] = 1,
    address: Annotated[
        str | None,
        Option(help="Use the Ray cluster at this address.", show_default="this machine"),
    ] = None,
    weights: Annotated[
        str | None,
        Option(
            help="Read the weights from a folder in the diffusers layout, a Hub repository or a "
            "single file.",
            metavar="SPEC",
            show_default="the model's own",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        Option(help="Apply a LoRA. May be repeated.", metavar="SPEC@SCALE", show_default="none"),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        Option(help="Keep the weights in this type.", show_default="the checkpoint's"),
    ] = None,
    setting: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="Use this setting where a row has none, as in steps=4. May be repeated.",
            metavar="NAME=VALUE",
            show_default="the model's",
        ),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Makes pictures of a table of prompts in a Ray cluster, with retries."""
    from eqxdiff import SettingError, SourceError
    from eqxdiff.bulk import run

    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SourceError("This needs Ray: pip install 'eqxdiff[ray]'.") from None
    given: dict[str, Any] = {}
    for text in setting or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"--set {text} is not understood: write NAME=VALUE.")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there what its workers tell
        ray.init(address, ignore_reinit_error=True, log_to_driver=False)
        index = run(
            model,
            prompts,
            output,
            workers=workers,
            batch_size=batch_size,
            resources={"num_cpus": cpus, "num_gpus": gpus},
            given=given,
            weights=weights,
            loras=lora or (),
            dtype=dtype,
        )
    print(json.dumps({"index": str(index)}) if as_json else index, flush=True)
