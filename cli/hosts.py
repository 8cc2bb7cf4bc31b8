"""Several processes that run one command together."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax

from eqxdiff import SettingError
from eqxdiff.bulk import PromptLine
from eqxdiff.distributed import Hosts, join

from .order import Order


UNLIKE = {"coordinator", "process_id", "start_timeout", "as_json", "quiet"}
"""Options that processes may be given differently."""

COMPARED = {"prompt", "prompt_file", "weights", "lora", "parts", "settings", "compile_cache"}
"""Options of which not the words are compared but the content, or nothing."""


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    process_id: int | None,
    num_processes: int | None,
    timeout: float,
    facts: Mapping[str, Any],
    *,
    mesh: str | None,
    as_json: bool,
) -> Iterator[Hosts]:
    """Joins the processes of a command: see `eqxdiff.distributed.join`.

    **Raises:** `HostsError`; `SettingError` where several processes have no mesh to share.
    """
    with contextlib.ExitStack() as stack:
        if coordinator is not None:
            stack.enter_context(_own_stdout())
        hosts = stack.enter_context(
            join(
                coordinator,
                process_id,
                num_processes,
                facts=facts,
                timeout=timeout,
                on_loss=_ending(as_json),
            )
        )
        if hosts.count > 1 and mesh is None:
            raise SettingError(
                f"{hosts.count} processes need `mesh`, which spreads the work over their "
                f"{jax.device_count()} devices, as in data={jax.device_count()}."
            )
        yield hosts


@contextlib.contextmanager
def _own_stdout() -> Iterator[None]:
    """Keeps stdout for the command: Gloo prints to its file descriptor."""
    sys.stdout.flush()
    own, before = os.dup(1), sys.stdout
    os.dup2(2, 1)
    with os.fdopen(own, "w", encoding="utf-8", errors="surrogateescape") as sys.stdout:
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(own, 1)
            sys.stdout = before


def _ending(as_json: bool) -> Callable[[str], NoReturn]:
    def end(message: str) -> NoReturn:
        event = json.dumps({"event": "error", "message": message})
        with contextlib.suppress(OSError, ValueError):
            os.write(2, f"\n{event if as_json else f'error: {message}'}\n".encode())
            sys.stdout.flush()
        os._exit(1)

    return end


def order_facts(order: Order, lines: Sequence[PromptLine]) -> dict[str, Any]:
    """Returns what of an order must be the same on all processes."""
    words = {
        field.name: getattr(order, field.name)
        for field in dataclasses.fields(order)
        if field.name not in UNLIKE | COMPARED
    }
    facts = {f"`{name}`": str(value) for name, value in {**words, **order.settings}.items()}
    return facts | {"the digest of the prompts": digest_of(lines)}


def digest_of(value: Any) -> str:
    """Returns a short digest of what JSON can say."""
    text = json.dumps(value, sort_keys=True, default=lambda each: dataclasses.asdict(each))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
