"""The command that writes a checkpoint in another layout."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from .progress import JsonReport, TextReport, libraries_tell
from .signals import SIGNALS


Dtype = Literal["float32", "bfloat16", "float16"]
Layout = Literal["diffusers", "single-file"]


def convert(
    source: Annotated[
        str, Argument(metavar="SRC", help="A file, folder, Hub repository or REPOSITORY:FILE.")
    ],
    target: Annotated[
        Path, Argument(metavar="DST", help="The folder or file to write; it must not exist.")
    ],
    to: Annotated[
        Layout | None,
        Option(
            help="Write this layout.",
            show_default="single-file where DST ends in .safetensors, else diffusers",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        Option(help="Write the weights in this type.", show_default="each tensor's own"),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            help="The name of the model, such as sd21-base.",
            metavar="NAME",
            show_default="as the header tells",
        ),
    ] = None,
    configs: Annotated[
        str | None,
        Option(
            help="Take the configs of a single file from this folder or repository.",
            metavar="SPEC",
            show_default="the model's own repository",
        ),
    ] = None,
    complete: Annotated[
        bool,
        Option(
            "--complete", help="Take the components that SRC lacks from the place of the configs."
        ),
    ] = False,
    only: Annotated[
        str | None,
        Option(
            help="Write only this component, such as transformer, to the single file.",
            metavar="NAME",
            show_default="all components",
        ),
    ] = None,
    pickle: Annotated[
        bool,
        Option("--pickle", help="Allow pickles (.ckpt, .bin): only their tensors are read."),
    ] = False,
    revision: Annotated[
        str | None,
        Option(help="Use this branch, tag or commit of SRC.", metavar="NAME", show_default="main"),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything and list the files, but write nothing.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, Option("--quiet", help="Print no progress.")] = False,
) -> None:
    """Converts a checkpoint of any layout to a diffusers folder or to the original single file.

    DST appears when it is complete. Run an interrupted command again to resume writing a folder.
    """
    from eqxdiff import SettingError
    from eqxdiff.convert import (
        open_checkpoint,
        plan_file,
        plan_folder,
        write_file,
        write_folder,
    )

    single = target.suffix == ".safetensors" if to is None else to == "single-file"
    if only is not None and not single:
        raise SettingError("--only would be ignored without --to single-file.")
    if target.exists():
        raise SettingError(f"{target} exists already: name what does not.")
    report = JsonReport(quiet) if as_json else TextReport(quiet)
    with libraries_tell(report):
        checkpoint = open_checkpoint(
            source, model=model, configs=configs, revision=revision, pickle=pickle
        )
        if complete:
            checkpoint = checkpoint.completed()
        if single:
            targets = plan_file(checkpoint, target.name, dtype, only)
        else:
            targets = plan_folder(checkpoint, dtype)
        for text in notes(checkpoint, model):
            report.note("note", text)
        if not dry_run:
            write = write_file if single else write_folder
            what = f"writing {target.name}"
            progress = lambda file, done, total: report.progress(what, done, total)
            with SIGNALS.raised():
                write(checkpoint, target, targets, progress)
    report.close()
    summary: dict[str, Any] = {
        "source": source,
        "target": str(target),
        "model": checkpoint.model,
        "layout": "single-file" if single else "diffusers",
        "components": list(checkpoint.components),
        "missing": checkpoint.missing,
        "bytes": sum(item.nbytes for item in targets),
        "files": [{"path": item.path, "bytes": item.nbytes} for item in targets],
        "written": not dry_run,
    }
    if as_json:
        print(json.dumps(summary))
    elif dry_run:
        for item in targets:
            print(f"{item.nbytes:>15,}  {item.path}")
    else:
        print(target)


def notes(checkpoint: Any, model: str | None) -> list[str]:
    """Tells the user what the conversion took for granted."""
    texts = [f"{checkpoint.name} holds {checkpoint.model}"]
    if model is None and checkpoint.alike:
        texts[0] += f", or one that looks the same: {', '.join(checkpoint.alike)} (--model)"
    if checkpoint.name != checkpoint.configs.name:
        texts.append(f"configs and tokenizers are those of {checkpoint.configs.name}")
    if checkpoint.missing:
        lacks = ", ".join(checkpoint.missing)
        texts.append(f"{lacks}: not in {checkpoint.name} and not written (--complete adds them)")
    return texts
