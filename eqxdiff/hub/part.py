"""Where weights are: a whole model's, or one component's from elsewhere than its own folder."""

import dataclasses
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from .._errors import SourceError
from ..tensors import PICKLES, AbstractTensorSource, SafetensorsFile
from .source import Source, open_source
from .stores import Folder


CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """A component's files.

    **Fields:**

    - `folder`: the component's folder within the source; `""` is the source itself.
    - `file`: the file of its weights; `None` for whatever weights the folder has.
    """

    source: Source
    folder: str
    file: str | None = None

    @property
    def identity(self) -> Mapping[str, str]:
        """Tells these weights from others: by the header and size of a local file."""
        if self.file is not None and Path(self.source.name).is_dir():
            return {"file": self.file, "sha256": SafetensorsFile(self.path()).fingerprint}
        return {**self.source.identity, "file": self._within(self.file or "")}

    def config(self) -> Mapping[str, Any] | None:
        """Reads the `config.json`; a file may come without one: `None`.

        **Raises:** `SourceError`, `ConfigError`.
        """
        path = self._within(CONFIG)
        if self.file is not None and not self.source.exists(path):
            return None
        return self.source.read_json(path)

    def tensors(self) -> AbstractTensorSource:
        """Opens the weights, fetched if need be. **Raises:** `SourceError`, `CheckpointError`."""
        if self.file is None:
            return self.source.tensors(self.folder)
        return SafetensorsFile(self.path())

    def path(self) -> Path:
        """Returns the file on disk, downloaded if need be. **Raises:** `SourceError`."""
        return self.source.path(self._within(self.file or ""))

    def _within(self, name: str) -> str:
        return "/".join(filter(None, (self.folder, name)))


def open_part(spec: str, *, revision: str | None = None, others: bool = False) -> Part:
    """Opens a component that was asked for by itself.

    **Arguments:**

    - `spec`: a `.safetensors` file, a folder with a `config.json` and weights, a Hub repository
        of this kind, or `REPOSITORY:FILE` or `REPOSITORY:FOLDER`. Files on disk come before the
        Hub.
    - `revision`: of a repository.
    - `others`: whether a file in another format than safetensors is accepted.

    **Raises:** `SourceError`.
    """
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return Part(Source(Folder(path)), "")
    if spec and path.is_file():
        if not others:
            _refuse_others(spec)
        return Part(Source(Folder(path.parent)), "", path.name)
    repository, _, inner = spec.partition(":")
    if not inner:
        return Part(open_source(repository, revision=revision, first=CONFIG), "")
    folder, _, name = inner.rpartition("/")
    if not name.endswith((".safetensors", ".msgpack", *PICKLES)):
        inner = inner.rstrip("/")
        first = f"{inner}/{CONFIG}"
        return Part(open_source(repository, revision=revision, first=first), inner)
    if not others:
        _refuse_others(name)
    return Part(open_source(repository, revision=revision, first=inner), folder, name)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Where the weights of a whole model are.

    **Fields:**

    - `source`: a folder in the diffusers layout: configs, tokenizers, and what `single` lacks.
    - `single`: a file with the whole model or some of it, if one was given.
    """

    source: Source
    single: Part | None

    def note(self, components: Iterable[str], found: Container[str]) -> str | None:
        """Says in a sentence what the single file lacks; `None` where there is no such file."""
        if self.single is None:
            return None
        lacks = [name for name in components if name not in found]
        what = ", ".join([*lacks, "configs", "tokenizers"])
        return f"{self.single.file} has no {what}: those of {self.source.name} are used"


def open_weights(weights: str | None, repository: str, *, revision: str | None = None) -> Weights:
    """Opens a folder, a repository or a single file.

    **Arguments:**

    - `weights`: what the user gave: a folder or Hub repository in the diffusers layout, a
        `.safetensors` file, or `REPOSITORY:FILE`; `None` for `repository`.
    - `repository`: what completes a single file.
    - `revision`: of what was given.

    **Raises:** `SourceError`; `CheckpointError` where the file is damaged.
    """
    if weights is not None and is_file(weights):
        part = open_part(weights, revision=revision)
        part.tensors()  # a damaged file is reported before the repository is asked for
        return Weights(open_source(repository), part)
    return Weights(open_source(weights or repository, revision=revision), None)


def is_file(spec: str) -> bool:
    """Tells whether `spec` means a file, not a folder or repository. **Raises:** `SourceError`."""
    path = Path(spec).expanduser()
    if spec and path.exists():
        return not path.is_dir()
    file = spec.endswith((".safetensors", ".msgpack", *PICKLES))
    if file and ":" not in spec:
        raise SourceError(f"There is no file {spec}.")
    return file


def _refuse_others(name: str) -> None:
    if name.endswith(".msgpack"):
        raise SourceError(
            f"{name} holds weights of Flax: `eqxdiff convert` makes safetensors of it."
        )
    if name.endswith(PICKLES):
        raise SourceError(
            f"{name} is a pickle, which can run any code when it is opened: give safetensors. "
            "`eqxdiff convert --pickle` reads the tensors of one and nothing else."
        )
