"""The options of `eqxdiff train`, and what it tells."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

from typer import Argument, Option


SPARSE_SECONDS = 10.0
"""How often progress is printed where a line cannot be overwritten."""


def train(
    config: Annotated[Path, Argument(help="A TOML file; recipes/ in the repository has some.")],
    output: Annotated[
        Path, Option("--output", "-o", help="The folder of the run: log, samples, states, model.")
    ],
    resume: Annotated[
        bool, Option("--resume", help="Go on with the run in --output from its last state.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print nothing but the model.")] = False,
    as_json: Annotated[
        bool, Option("--json", help="Print JSON: progress on stderr, one a line.")
    ] = False,
) -> None:
    """Trains a model on a folder of images with captions."""
    from eqxdiff.training import read_config, train

    from .cache import compile_cache

    tell = _Telling(quiet, as_json)
    with compile_cache(None):
        folder = train(read_config(config), output, resume=resume, report=tell)
    tell.clear()
    print(json.dumps({"model": str(folder)}) if as_json else folder, flush=True)


class _Telling:
    """Progress on stderr: a terminal gets one line that overwrites itself."""

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
        if self._line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._line = False


def describe(facts: Mapping[str, Any]) -> str:
    """A line of progress."""
    minutes, seconds = divmod(round(facts["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02}"
    return (
        f"step {facts['step']} of {facts['steps']}: loss {facts['loss']:.5f}, "
        f"{facts['images_per_second']:.1f} images/s, {left} left"
    )
