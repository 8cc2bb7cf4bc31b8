"""The cache of compiled programs, and the time that compiling takes."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from .output import OutputError


COMPILING = "/jax/core/compile/"
COMPILED = "/jax/core/compile/backend_compile_duration"
HIT = "/jax/compilation_cache/cache_hits"


def default_folder() -> Path | None:
    """Returns the user's own folder, or `None` where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "eqxdiff" / "xla"
    except RuntimeError:
        return None


@contextlib.contextmanager
def compile_cache(folder: Path | None) -> Iterator[Path | None]:
    """Keeps compiled programs for the next process: in `folder`, else in JAX's, else in the user's.

    Yields the folder, or `None` where no folder can be used.

    **Raises:** `OutputError` where `folder` is given and cannot be written.
    """
    chosen = folder or _configured()["jax_compilation_cache_dir"] or default_folder()
    try:
        if chosen is not None:
            Path(chosen).mkdir(parents=True, exist_ok=True)
            if not os.access(chosen, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
    except OSError as error:
        if folder is not None:
            raise OutputError(
                f"--compile-cache {folder} cannot be used: {error.strerror}."
            ) from None
        chosen = None
    if chosen is None:
        yield None
        return
    before = _configured()
    # Small programs are kept too: together they take as long as a large one.
    _configure(dict(zip(before, (str(chosen), 0.0, -1), strict=True)))
    try:
        with warnings.catch_warnings():
            # A damaged entry is compiled anew, and its warning says nothing to a user.
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation")
            yield Path(chosen)
    finally:
        _configure(before)


def _configured() -> dict[str, Any]:
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    return {name: getattr(jax.config, name) for name in names}


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # or else the first folder of the process stays


class CompileMeter:
    """Counts and times the compilations in its `with` block.

    - `programs`: the number of programs that were compiled or found in the cache.
    - `hits`: the number of programs that were found in the cache.
    """

    def __init__(self) -> None:
        self.programs, self.hits = 0, 0
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "CompileMeter":
        jax.monitoring.register_event_duration_secs_listener(self._span)
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._span)
        jax.monitoring.unregister_event_listener(self._event)

    def _span(self, event: str, duration_secs: float, **_: object) -> None:
        if event.startswith(COMPILING):
            now = perf_counter()
            self._spans.append((now - duration_secs, now))
            self.programs += event == COMPILED

    def _event(self, event: str, **_: object) -> None:
        self.hits += event == HIT

    @property
    def seconds(self) -> float:
        """Returns the time in which anything was traced or compiled, overlaps counted once."""
        total, end = 0.0, 0.0
        for start, stop in sorted(self._spans):
            total += max(stop - max(start, end), 0.0)
            end = max(end, stop)
        return total


class Clock:
    """Seconds by the work that they were spent on, without the seconds of compiling."""

    def __init__(self, meter: CompileMeter):
        self._meter = meter
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start, compiling = perf_counter(), self._meter.seconds
        yield
        spent = perf_counter() - start - (self._meter.seconds - compiling)
        self.seconds[what] = self.seconds.get(what, 0.0) + max(spent, 0.0)
