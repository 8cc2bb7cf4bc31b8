"""One component from somewhere else than the model's own folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._errors import SourceError
from .hub import PICKLES, Folder, Source, open_source
from .safetensors import SafetensorsFile
from .source import AbstractTensorSource


CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """A component's files.

    **Fields:**

    - `folder`: the component's folder within the source; `""` is the source itself.
    - `file`: its weights, where one file is meant rather than whatever the folder has.
    """

    source: Source
    folder: str
    file: str | None = None

    @property
    def identity(self) -> Mapping[str, str]:
        """Tells these weights from others."""
        return {**self.source.identity, "file": self._within(self.file or "")}

    def config(self) -> Mapping[str, Any] | None:
        """The `config.json`; `None` where there is none beside a file. **Raises:** `SourceError`,
        `ConfigError`."""
        path = self._within(CONFIG)
        if self.file is not None and not self.source.exists(path):
            return None
        return self.source.read_json(path)

    def tensors(self) -> AbstractTensorSource:
        """The weights, downloaded if need be. **Raises:** `SourceError`, `CheckpointError`."""
        if self.file is None:
            return self.source.tensors(self.folder)
        return SafetensorsFile(self.source.path(self._within(self.file)))

    def _within(self, name: str) -> str:
        return "/".join(filter(None, (self.folder, name)))


def open_part(spec: str, *, revision: str | None = None) -> Part:
    """Opens a component that was asked for by itself.

    **Arguments:**

    - `spec`: a `.safetensors` file, a folder with a `config.json` and weights, a Hub repository
        that is one, or `REPOSITORY:FILE` or `REPOSITORY:FOLDER`. What exists on disk goes first.
    - `revision`: of a repository.

    **Raises:** `SourceError`.
    """
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return Part(Source(Folder(path)), "")
    if spec and path.is_file():
        _refuse_pickle(spec)
        return Part(Source(Folder(path.parent)), "", path.name)
    repository, _, inner = spec.partition(":")
    if not inner:
        return Part(open_source(repository, revision=revision, first=CONFIG), "")
    folder, _, name = inner.rpartition("/")
    if not name.endswith((".safetensors", *PICKLES)):
        inner = inner.rstrip("/")
        first = f"{inner}/{CONFIG}"
        return Part(open_source(repository, revision=revision, first=first), inner)
    _refuse_pickle(name)
    return Part(open_source(repository, revision=revision, first=inner), folder, name)


def _refuse_pickle(name: str) -> None:
    if name.endswith(PICKLES):
        raise SourceError(
            f"{name} is a pickle, which can run any code when it is opened: give safetensors. "
            "`eqxdiff convert --pickle` reads the tensors of one and nothing else."
        )
