"""One of many jobs that share a file of prompts: which lines are its own."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eqxdiff import SettingError
from eqxdiff._files import write_whole
from eqxdiff.bulk import PromptLine, naming, picture_name
from eqxdiff.models import applied, check_range
from eqxdiff.pipeline import Blueprint, Request

from .order import Order


BLOCK = 256
"""So many pictures are prepared at a time."""

VARIABLES = {
    "SLURM_ARRAY_TASK_ID": "SLURM_ARRAY_TASK_MIN",
    "JOB_COMPLETION_INDEX": None,
    "AWS_BATCH_JOB_ARRAY_INDEX": None,
    "CLOUD_RUN_TASK_INDEX": None,
    "OMPI_COMM_WORLD_RANK": None,
    "PMI_RANK": None,
    "SLURM_PROCID": None,
}
"""Where schedulers say the number of a job: array jobs of SLURM, indexed jobs of Kubernetes, AWS
Batch, Cloud Run, MPI, and tasks of SLURM. The second is the variable of the first job's number."""


def pick_shard(
    count: int | None, given: int | None, environ: Mapping[str, str] = os.environ
) -> tuple[int, int] | None:
    """Returns which of how many jobs this is; `None` where there is only one.

    **Raises:** `SettingError` where nobody says the number, or it is out of range.
    """
    if count is None:
        if given is not None:
            raise SettingError("`shard` would be ignored without `shard_of`.")
        return None
    check_range("shard_of", count, 1)
    if given is not None:
        check_range("shard", given, 0, count - 1)
        return given, count
    name = next((name for name in VARIABLES if environ.get(name, "").isdecimal()), None)
    if name is None:
        raise SettingError(
            "`shard_of` needs the number of this job: give `shard`, from 0 on. Of schedulers it is "
            f"known from {', '.join(VARIABLES)}."
        )
    number = int(environ[name]) - int(environ.get(VARIABLES[name] or "", "0") or 0)
    if not 0 <= number < count:
        raise SettingError(
            f"{name} makes this job {number} of `shard_of` {count}: they are from 0 to {count - 1}."
        )
    return number, count


def check_shared(order: Order) -> None:
    """**Raises:** `SettingError` where an option has no place in one job of many."""
    if order.prompt_file in (None, "-") or order.prompt:
        raise SettingError("`shard_of` shares the lines of `prompt_file`: give a file of prompts.")
    for name in ("noise", "save_latents"):
        if getattr(order, name) is not None:
            raise SettingError(f"`{name}` is for one job: it does not go with `shard_of`.")
    if order.output.lower().endswith(".png") or "{" in order.output:
        raise SettingError(f"`output` {order.output}: `shard_of` needs a folder.")


def shard_paths(
    order: Order,
    blueprint: Blueprint,
    lines: Sequence[PromptLine],
    requests: Sequence[Request],
    inputs: Mapping[str, Any],
) -> list[Path]:
    """Returns the file of each picture. **Raises:** `SettingError` that names a line."""
    paths = []
    for line, request in zip(lines, requests, strict=True):
        with naming(line.where):
            name = picture_name(blueprint, line.number, request, inputs)
        paths.append(Path(order.output) / name)
    return paths


def write_index(
    order: Order,
    shard: tuple[int, int],
    blueprint: Blueprint,
    lines: Sequence[PromptLine],
    requests: Sequence[Request],
    paths: Sequence[Path],
) -> None:
    """Writes the list of all pictures of this job, once they are all there."""
    facts = [
        {
            "line": line.number,
            "file": path.name,
            "prompt": request.text,
            "seed": request.seed,
            "settings": applied(blueprint.resolve(request.settings)),
        }
        for line, request, path in zip(lines, requests, paths, strict=True)
    ]
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in facts)
    path = Path(order.output) / f"index-{shard[0]}-of-{shard[1]}.jsonl"
    write_whole(path, text.encode(), overwrite=True)
