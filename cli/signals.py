"""Ctrl-C and SIGTERM, served by a thread of their own.

Python runs the handlers of signals in the main thread alone. That thread may be inside one program
of XLA for minutes, or inside an import or a callback that swallows the exception. So a thread
waits for the signals, removes unfinished files and ends the process.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from eqxdiff._errors import printable


NAMES = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
"""The signals that end the program. The status of the process is 128 and the signal's number."""


class Terminated(BaseException):
    """SIGTERM has come. Like `KeyboardInterrupt` it passes through `except Exception`."""


class Signals:
    """Ends the process on the first signal, after removing unfinished files, and says what is kept.

    A second signal ends it at once. The signals belong to the process, and so does the one instance
    of this class, `SIGNALS`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._cleanups: list[Callable[[], None]] = []
        self._saved: list[Path] = []
        self._count = 0
        self._raises = 0

    def serve(self, *, as_json: bool) -> None:
        """Serves the signals until the process ends. The main thread calls this, once.

        **Arguments:**

        - `as_json`: whether the last sentence is an event of JSON.
        """
        # A shell's background job ignores SIGINT, and stays so.
        heeded = [n for n in NAMES if signal.getsignal(n) is not signal.SIG_IGN]
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        threading.Thread(target=self._listen, args=(reader, as_json), daemon=True).start()
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        for number in heeded:
            signal.signal(number, self._in_main_thread)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Lets the block end before the process does. It is to be short."""
        with self._lock:
            yield

    @contextlib.contextmanager
    def cleaned(self, cleanup: Callable[[], None]) -> Iterator[None]:
        """Calls `cleanup` where the block fails, or where a signal ends the process in it."""
        self._cleanups.append(cleanup)
        try:
            yield
        except BaseException:
            cleanup()
            raise
        finally:
            self._cleanups.remove(cleanup)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raises the first signal in the main thread, for work that cleans up after itself."""
        self._raises += 1
        try:
            yield
        finally:
            self._raises -= 1

    def saved(self, path: Path) -> None:
        """Notes a file that is written, for the last sentence."""
        self._saved.append(path)

    def sentence(self, number: int) -> str:
        """Returns what is said in the end."""
        name = NAMES[signal.Signals(number)]
        if not self._saved:
            return f"{name}."
        last = f"{self._saved[-1]}"
        rest = len(self._saved) - 1
        others = f" and {rest} before it" if rest else ""
        return f"{name}: {last}{others} {'are' if rest else 'is'} complete."

    def _in_main_thread(self, number: int, _: object) -> None:
        if self._raises:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _listen(self, reader: socket.socket, as_json: bool) -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                if number in NAMES:
                    self._end(number, as_json)

    def _end(self, number: int, as_json: bool) -> None:
        self._count += 1
        if self._count > 1:
            os._exit(128 + number)
        if self._raises:
            return
        # Another thread ends the process, so that this one hears the second signal meanwhile.
        threading.Thread(target=self._finish, args=(number, as_json), daemon=True).start()

    def _finish(self, number: int, as_json: bool) -> None:
        with self._lock:
            for cleanup in reversed(self._cleanups):
                with contextlib.suppress(OSError):
                    cleanup()
            tell(self.sentence(number), as_json)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(128 + number)


SIGNALS = Signals()


def tell(message: str, as_json: bool) -> None:
    """Prints the sentence on stderr that the program ends with."""
    # A name from a file could control the terminal.
    message = "\n".join(printable(line) for line in message.split("\n"))
    if as_json:
        message = json.dumps({"event": "error", "message": message})
    else:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        message = f"{clear}error: {message}"
    print(message, file=sys.stderr, flush=True)
