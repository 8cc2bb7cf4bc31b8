"""Processes that work on one thing notice when one of them is gone, and compare notes.

Each process keeps a connection to process 0 open. JAX's own service ends a process by a failed
check in C++, up to minutes later; a closed connection tells at once, and which process it was.
Messages are lines of JSON. Nothing here needs JAX.
"""

import contextlib
import dataclasses
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, NoReturn

from ._errors import HostsError, printable


MOST_LINE = 1 << 24
LINGER_SECONDS = 2.0
"""How long process 0 waits for the others to end, so that its own end tells them nothing new."""


def end_process(message: str) -> NoReturn:
    """Prints an error and ends the process, whatever its main thread waits for."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"error: {message}\n".encode())
        sys.stdout.flush()
    os._exit(1)


@dataclasses.dataclass(eq=False)
class Peer:
    """Another process, at the other end of a connection."""

    name: str
    connection: socket.socket
    messages: Iterator[dict[str, Any]]
    said: "queue.Queue[dict[str, Any]]" = dataclasses.field(default_factory=queue.Queue)
    heard: float = dataclasses.field(default_factory=monotonic)
    left: bool = False
    gone: threading.Event = dataclasses.field(default_factory=threading.Event)
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def hear(self) -> Any:
        """Waits for the facts of the other process. **Raises:** `HostsError` where it is lost."""
        message = self.said.get()
        if "lost" in message:
            raise HostsError(message["lost"])
        return message["said"]

    def send(self, **message: Any) -> None:
        with self.lock, contextlib.suppress(OSError):  # the reader notices who is gone
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class Watch:
    """The connections of this process, which `meet` makes: of process 0 with all others, and of
    each other one with process 0."""

    def __init__(
        self,
        process: int,
        count: int,
        peers: Mapping[int, Peer],
        silence: float,
        on_loss: Callable[[str], None],
    ) -> None:
        self.process, self.count = process, count
        self._peers, self._silence, self._on_loss = peers, silence, on_loss
        self._over, self._lost = threading.Event(), threading.Lock()
        for peer in self._peers.values():
            peer.heard = monotonic()
            threading.Thread(target=self._read, args=(peer,), daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()

    def _read(self, peer: Peer) -> None:
        stop = None
        with contextlib.suppress(OSError), peer.connection:
            for message in peer.messages:
                peer.heard = monotonic()
                if "said" in message:
                    peer.said.put(message)
                elif "left" in message:
                    peer.left = True
                elif "stop" in message:
                    stop = message["stop"]
                    break
        peer.gone.set()
        if stop is not None:
            self._stop(stop)
        if not peer.left:
            self._stop(f"{peer.name} has ended unexpectedly, and this process cannot go on alone.")

    def _ping(self) -> None:
        while not self._over.wait(self._silence / 4):
            for peer in self._peers.values():
                peer.send(ping=1)
                if not peer.left and monotonic() - peer.heard > self._silence:
                    self._stop(
                        f"{peer.name} has not been heard of for {self._silence:g} s: its machine "
                        "or network is down."
                    )

    def _stop(self, message: str) -> None:
        """Passes the reason on, waits until the others have it, and ends this process."""
        if self._over.is_set() or not self._lost.acquire(blocking=False):
            return
        self._tell(message)
        self._on_loss(message)
        for peer in self._peers.values():
            peer.said.put({"lost": message})

    def _tell(self, message: str) -> None:
        for peer in self._peers.values():
            peer.send(stop=message)
        until = monotonic() + LINGER_SECONDS
        for peer in self._peers.values() if self.process == 0 else ():
            peer.gone.wait(max(until - monotonic(), 0))

    def agree(self, facts: Mapping[str, Any], own: Any = None) -> Any:
        """Waits for all processes to get here and compares facts, which must be the same.

        **Arguments:**

        - `facts`: by name, of types that JSON has.
        - `own`: something of this process.

        **Returns:** what process 0 gave as `own`.

        **Raises:** `HostsError` that says what differs and on which process.
        """
        facts = {name: json.loads(json.dumps(value)) for name, value in facts.items()}
        if self.process:
            self._peers[0].send(said=facts)
            reply = self._peers[0].hear()
        else:
            says = {0: facts, **{k: peer.hear() for k, peer in self._peers.items()}}
            problem = differences([says[k] for k in sorted(says)])
            reply = {"error": problem, "own": own}
            for peer in self._peers.values():
                peer.send(said=reply)
        if reply["error"]:
            self.leave()
            raise HostsError(reply["error"])
        return reply["own"]

    def leave(self) -> None:
        """Ends the watch where all is done and every process knows."""
        self._over.set()
        for peer in self._peers.values():
            peer.send(left=1)
            with contextlib.suppress(OSError):
                peer.connection.shutdown(socket.SHUT_WR)

    def fail(self, message: str) -> None:
        """Tells the others why this process stops."""
        if self._lost.acquire(blocking=False):
            self._over.set()
            self._tell(f"Process {self.process} has stopped: {message}")

    def wait_for_news(self, seconds: float) -> None:
        """Gives the watch time to end this process, where another one has caused an error here."""
        self._over.wait(seconds)


def differences(facts: Sequence[Mapping[str, Any]]) -> str:
    """Says which facts are not the same on all processes; an empty text where all are."""
    problems = []
    for name in sorted({name for each in facts for name in each}):
        values = [each.get(name) for each in facts]
        other = next((k for k, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            first, second = (_short(values[k]) for k in (0, other))
            problems.append(f"{name} is {first} on process 0 and {second} on process {other}")
    if not problems:
        return ""
    return f"The processes are not given the same: {'; '.join(problems)}."


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}"


def read_messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Yields the messages of a connection until its end. What is no message ends it, too."""
    pending = b""
    while len(pending) < MOST_LINE:
        *lines, pending = pending.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                return
            if not isinstance(message, dict):
                return
            yield message
        data = connection.recv(1 << 16)
        if not data:
            return
        pending += data
