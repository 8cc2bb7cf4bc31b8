"""Standard streams that are closed or cannot be written: a picture is made nevertheless."""

import os
import sys
from typing import Any, TextIO


class Enduring:
    """A stream for messages: what cannot be written is lost, and the program goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._stream = _nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._stream = _nowhere()


def endure() -> None:
    """Gives the process streams in place of closed ones, and a stderr that may be full."""
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = Enduring(sys.stderr or _nowhere())


def _nowhere() -> TextIO:
    return open(os.devnull, "w")
