"""The options of `eqxdiff train`, and its progress."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

from typer import Argument, Option

from .signals import SIGNALS


SPARSE_SECONDS = 10.0
"""The time between two lines of progress where a line cannot be overwritten."""


def train(
    config: Annotated[
        Path, Argument(help="A TOML file, such as those in recipes/ of the repository.")
    ],
    output: Annotated[
        Path,
        Option("--output", "-o", help="Write log, samples, states and model to this folder."),
    ],
    resume: Annotated[
        bool, Option("--resume", help="Go on with the run in --output from its last state.")
    ] = False,
    mesh: Annotated[
        str | None,
        Option(
            help="Spread the batch and the weights over devices, as in data=4,fsdp=2.",
            metavar="AXES",
            show_default="one device",
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        Option(
            help="Join other processes, which are called alike, at this address of process 0; auto "
            "asks the TPU pod, SLURM, Kubernetes or Open MPI for address and numbers.",
            metavar="HOST:PORT",
            show_default="one process",
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        Option(help="The number of this process, from 0 on.", show_default="detected"),
    ] = None,
    num_processes: Annotated[
        int | None,
        Option(help="The number of processes that join.", show_default="detected"),
    ] = None,
    start_timeout: Annotated[
        float, Option(help="Wait this many seconds for the other processes at the start.")
    ] = 300.0,
    quiet: Annotated[
        bool, Option("--quiet", "-q", help="Print only the folder of the model.")
    ] = False,
    as_json: Annotated[
        bool,
        Option("--json", help="Print the result as JSON, and progress as lines of JSON on stderr."),
    ] = False,
) -> None:
    """Trains a model on a folder of images with captions."""
    from eqxdiff.training import read_config, train

    from .cache import compile_cache
    from .hosts import joined
    from .mesh import mesh_of

    progress, settings = _TrainingProgress(quiet, as_json), read_config(config)
    facts = {"the config": str(settings), "`resume`": resume, "`mesh`": mesh}
    numbers = coordinator, process_id, num_processes, start_timeout, facts
    together = joined(*numbers, mesh=mesh, as_json=as_json)
    with compile_cache(None), SIGNALS.raised(), together as hosts:
        folder = train(settings, output, resume=resume, mesh=mesh_of(mesh), report=progress)
        progress.clear()
        if hosts.index == 0:
            print(json.dumps({"model": str(folder)}) if as_json else folder, flush=True)


class _TrainingProgress:
    """Prints progress on stderr: in a terminal one line that overwrites itself."""

    def __init__(self, quiet: bool, as_json: bool):
        self._quiet, self._json = quiet, as_json
        self._overwrites = sys.stderr.isatty() and not as_json
        self._last, self._line = 0.0, False

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        if self._json:
            plain = {k: v if isinstance(v, int | float) else str(v) for k, v in facts.items()}
            print(json.dumps({"event": event, **plain}), file=sys.stderr, flush=True)
            return
        if event != "progress":
            self.clear()
            print(facts.get("message", facts.get("path")), file=sys.stderr, flush=True)
        elif self._overwrites:
            print(f"\r\x1b[K{describe(facts)}", end="", file=sys.stderr, flush=True)
            self._line = True
        elif facts["step"] == facts["steps"] or monotonic() - self._last >= SPARSE_SECONDS:
            self._last = monotonic()
            print(describe(facts), file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line of progress."""
        if self._line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._line = False


def describe(facts: Mapping[str, Any]) -> str:
    """Returns a line of progress."""
    minutes, seconds = divmod(round(facts["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02}"
    return (
        f"step {facts['step']} of {facts['steps']}: loss {facts['loss']:.5f}, "
        f"{facts['images_per_second']:.1f} images/s, {left} left"
    )
