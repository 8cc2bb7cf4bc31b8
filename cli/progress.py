"""Reports of a running command: its progress on stderr, and the files that it wrote on stdout."""

import abc
import contextlib
import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any


SPARSE_SECONDS = 10.0
"""The time between two lines of progress where a line cannot be overwritten."""

OFTEN_SECONDS = 0.1
"""The time between two overwritten lines, or two events of loading."""


class AbstractReport(abc.ABC):
    """Reports to the user, or to the calling program."""

    @property
    @abc.abstractmethod
    def bars(self) -> bool:
        """Whether libraries may show progress bars of their own."""

    @abc.abstractmethod
    def progress(self, what: str, done: int, total: int) -> None:
        """Reports progress, in bytes where `what` begins with "loading" or "writing"."""

    @abc.abstractmethod
    def note(self, event: str, message: str, **details: Any) -> None:
        """Reports an event in a line. The event `"warning"` is shown in quiet mode, too."""

    @abc.abstractmethod
    def file(self, path: Path) -> None:
        """Reports that a file is written."""

    @abc.abstractmethod
    def finish(self, summary: dict[str, Any]) -> None:
        """Reports the end of the run."""

    @abc.abstractmethod
    def close(self) -> None:
        """Removes the line of progress, if there is one, for other output."""


class JsonReport(AbstractReport):
    """Prints events as lines of JSON on stderr, and one JSON object on stdout in the end."""

    def __init__(self, quiet: bool):
        self._quiet, self._last = quiet, 0.0

    @property
    def bars(self) -> bool:
        return False

    def _emit(self, **event: Any) -> None:
        print(json.dumps(event), file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int) -> None:
        soon = what.startswith(("loading", "writing")) and monotonic() - self._last < OFTEN_SECONDS
        if not self._quiet and (done >= total or not soon):
            self._last = monotonic()
            self._emit(event="progress", what=what, done=done, total=total)

    def note(self, event: str, message: str, **details: Any) -> None:
        if event == "warning" or not self._quiet:
            self._emit(event=event, message=message, **details)

    def file(self, path: Path) -> None:
        if not self._quiet:
            self._emit(event="file", path=str(path))

    def finish(self, summary: dict[str, Any]) -> None:
        print(json.dumps(summary, indent=2), flush=True)

    def close(self) -> None:
        pass


class TextReport(AbstractReport):
    """Prints lines for people; a terminal gets one line that overwrites itself."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._overwrites = sys.stderr.isatty()
        self._what, self._last, self._since = "", 0.0, (0.0, 0)
        self._line = False

    @property
    def bars(self) -> bool:
        return not self._quiet

    def progress(self, what: str, done: int, total: int) -> None:
        if self._quiet:
            return
        now = monotonic()
        if what != self._what or done < self._since[1]:
            self._what, self._since = what, (now, done)
            self._last = -math.inf if self._overwrites else now
        elif self._since[1] == 0:
            self._since = (now, done)  # the first step includes compiling
        pause = OFTEN_SECONDS if self._overwrites else SPARSE_SECONDS
        if done < total and now - self._last < pause:
            return
        self._last = now
        text = describe(what, done, total, self._rate(now, done))
        if self._overwrites:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
            self._line = True
        else:
            print(text, file=sys.stderr, flush=True)

    def _rate(self, now: float, done: int) -> float | None:
        start, first = self._since
        return (now - start) / (done - first) if done > first > 0 else None

    def note(self, event: str, message: str, **details: Any) -> None:
        if event == "warning" or not self._quiet:
            self.close()
            prefix = "warning: " if event == "warning" else ""
            print(prefix + message, file=sys.stderr, flush=True)

    def file(self, path: Path) -> None:
        self.close()
        print(path, flush=True)

    def finish(self, summary: dict[str, Any]) -> None:
        for line in conclusion(summary["timings"], summary["compiled"]):
            self.note("timing", line)

    def close(self) -> None:
        if self._line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._line = False


def describe(what: str, done: int, total: int, rate: float | None) -> str:
    """Returns a line of progress. `rate`: the seconds of each step, where they are known."""
    if what.startswith(("loading", "writing")):
        unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        return f"{what}: {done / unit:.1f} of {total / unit:.1f} {name}"
    text = f"{what}: {done} of {total}"
    if rate is not None and done < total:
        text += f", {rate:.2f} s each, {rate * (total - done):.0f} s left"
    return text


def conclusion(timings: Mapping[str, float], compiled: Mapping[str, int]) -> list[str]:
    """Returns the last lines, with the times of loading, compiling and sampling."""
    programs, hits = compiled["programs"], compiled["cache_hits"]
    return [
        f"load time: {timings['load_seconds']:.2f} s",
        f"compile time: {timings['compile_seconds']:.2f} s ({hits} of {programs} from the cache)",
        f"seconds an image: {timings['seconds_per_image']:.2f} s",
    ]


@contextlib.contextmanager
def libraries_tell(report: AbstractReport) -> Iterator[None]:
    """Sends the warnings of libraries to the report, which may hide their progress bars, too."""
    from huggingface_hub import utils

    def show(message: Warning | str, *_: object, **__: object) -> None:
        report.note("warning", str(message))

    hide = not report.bars and not utils.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.showwarning = show
        if hide:
            utils.disable_progress_bars()
        try:
            yield
        finally:
            if hide:
                utils.enable_progress_bars()
