"""Processes that work on one thing: they meet, compare notes, and notice when one of them is gone.

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
from time import monotonic, sleep
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
class _Peer:
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
    """The connections of this process. See `meet`."""

    def __init__(
        self, process: int, count: int, silence: float, on_loss: Callable[[str], None]
    ) -> None:
        self.process, self.count = process, count
        self._silence, self._on_loss = silence, on_loss
        self._peers: dict[int, _Peer] = {}
        self._over, self._lost = threading.Event(), threading.Lock()

    def _begin(self) -> None:
        for peer in self._peers.values():
            peer.heard = monotonic()
            threading.Thread(target=self._read, args=(peer,), daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()

    def _read(self, peer: _Peer) -> None:
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


def meet(
    address: str,
    process: int,
    count: int,
    facts: Mapping[str, Any],
    *,
    own: Any = None,
    timeout: float,
    silence: float,
    on_loss: Callable[[str], None] = end_process,
) -> tuple[Watch, Any]:
    """Waits until all processes have met at the address of process 0, and compares facts.

    **Arguments:**

    - `address`: `HOST:PORT`, where process 0 listens.
    - `facts`, `own`: as of `Watch.agree`.
    - `timeout`: the seconds after which a late process is an error.
    - `silence`: the seconds without a sign after which a process counts as lost.
    - `on_loss`: called in another thread with a message when a process is lost. It ends this one.

    **Returns:** the watch, and what process 0 gave as `own`.

    **Raises:** `HostsError`.
    """
    watch = Watch(process, count, silence, on_loss)
    hello = {"process": process, "count": count, "host": socket.gethostname()}
    try:
        if process == 0:
            watch._peers = _gather(address, count, timeout)
        else:
            watch._peers = {0: _reach(address, hello, timeout)}
    except OSError as error:
        why = error.strerror or error
        raise HostsError(f"`coordinator` {address} cannot be used: {why}.") from None
    watch._begin()
    return watch, watch.agree(facts, own)


def _gather(address: str, count: int, timeout: float) -> dict[int, _Peer]:
    """Waits for the other processes. **Raises:** `HostsError` that names those that are late."""
    until, peers = monotonic() + timeout, {}
    with _listen(address) as server:
        while len(peers) < count - 1:
            server.settimeout(max(until - monotonic(), 0.001))
            try:
                connection, _ = server.accept()
                connection.settimeout(5.0)
                messages = _messages(connection)
                hello = next(messages, {})
                problem = _wrong(hello, peers, count)
            except TimeoutError:
                if monotonic() < until:
                    continue
                late = [str(k) for k in range(1, count) if k not in peers]
                noun = "Process" if len(late) == 1 else "Processes"
                message = f"{noun} {', '.join(late)} of {count} did not start within {timeout:g} s."
                _refuse(peers, message)
            except OSError:
                continue
            if "process" not in hello:
                connection.close()  # somebody else
                continue
            number = hello["process"]
            name = f"Process {number} on {hello.get('host')}"
            peers.setdefault(number, _Peer(name, connection, messages))
            if problem:
                with connection, contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"stop": problem}).encode() + b"\n")
                _refuse(peers, problem)
    for peer in peers.values():
        peer.connection.settimeout(None)
        peer.send(host=socket.gethostname())
    return peers


def _refuse(peers: Mapping[int, _Peer], message: str) -> NoReturn:
    for peer in peers.values():
        peer.send(stop=message)
        peer.connection.close()
    raise HostsError(message)


def _wrong(hello: Mapping[str, Any], peers: Mapping[int, _Peer], count: int) -> str:
    """Says what is wrong with the numbers of a process that has come."""
    if "process" not in hello:
        return ""
    number = hello["process"]
    if hello.get("count") != count:
        return (
            f"The processes are not given the same: `num_processes` is {count} on process 0 and "
            f"{hello.get('count')} on process {number}."
        )
    if number in peers or number == 0:
        return f"Two processes have the `process_id` {number}: each needs its own."
    return ""


def _reach(address: str, hello: Mapping[str, Any], timeout: float) -> _Peer:
    """Connects to process 0 and waits until all are there. **Raises:** `HostsError`."""
    host, port = split_address(address)
    until = monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((host, port), max(until - monotonic(), 0.001))
            break
        except OSError as error:
            if monotonic() + 0.2 > until:
                raise HostsError(
                    f"`coordinator` {address} was not reached within {timeout:g} s "
                    f"({error.strerror or error}): start process 0 there, and check the address."
                ) from None
            sleep(0.2)
    # Process 0 began to wait before and knows who is late: let it say so.
    connection.settimeout(timeout + 5)
    messages, message = _messages(connection), {}
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(hello).encode() + b"\n")
        message = next(messages, {})
    if "host" not in message:
        connection.close()
        ended = f"Process 0 at {address} ended before all processes had started."
        raise HostsError(message.get("stop", ended))
    connection.settimeout(None)
    return _Peer(f"Process 0 on {message['host']}", connection, messages)


def _listen(address: str) -> socket.socket:
    host, port = split_address(address)
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def split_address(address: str) -> tuple[str, int]:
    """Splits `HOST:PORT`. **Raises:** `HostsError`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise HostsError(f"`coordinator` {address} is not understood: write HOST:PORT.")
    return host.strip("[]"), int(port)


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
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
