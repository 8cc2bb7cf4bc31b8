"""Processes meet at the address of process 0, before any of them starts JAX."""

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any, NoReturn

from ._errors import HostsError
from ._watch import Peer, Watch, end_process, read_messages


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
    hello = {"process": process, "count": count, "host": socket.gethostname()}
    try:
        if process == 0:
            peers = _gather(address, count, timeout)
        else:
            peers = {0: _reach(address, hello, timeout)}
    except OSError as error:
        why = error.strerror or error
        raise HostsError(f"`coordinator` {address} cannot be used: {why}.") from None
    watch = Watch(process, count, peers, silence, on_loss)
    return watch, watch.agree(facts, own)


def _gather(address: str, count: int, timeout: float) -> dict[int, Peer]:
    """Waits for the other processes. **Raises:** `HostsError` that names those that are late."""
    until, peers = monotonic() + timeout, {}
    with _listen(address) as server:
        while len(peers) < count - 1:
            server.settimeout(max(until - monotonic(), 0.001))
            try:
                connection, _ = server.accept()
                connection.settimeout(5.0)
                messages = read_messages(connection)
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
            peers.setdefault(number, Peer(name, connection, messages))
            if problem:
                with connection, contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"stop": problem}).encode() + b"\n")
                _refuse(peers, problem)
    for peer in peers.values():
        peer.connection.settimeout(None)
        peer.send(host=socket.gethostname())
    return peers


def _refuse(peers: Mapping[int, Peer], message: str) -> NoReturn:
    for peer in peers.values():
        peer.send(stop=message)
        peer.connection.close()
    raise HostsError(message)


def _wrong(hello: Mapping[str, Any], peers: Mapping[int, Peer], count: int) -> str:
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


def _reach(address: str, hello: Mapping[str, Any], timeout: float) -> Peer:
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
    messages, message = read_messages(connection), {}
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(hello).encode() + b"\n")
        message = next(messages, {})
    if "host" not in message:
        connection.close()
        ended = f"Process 0 at {address} ended before all processes had started."
        raise HostsError(message.get("stop", ended))
    connection.settimeout(None)
    return Peer(f"Process 0 on {message['host']}", connection, messages)


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
