"""Named files: those of a local folder, or of one commit of a repository on the Hub."""

import abc
import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from .._errors import CheckpointError
from ..tensors import SafetensorsFile
from .explain import INDEX, NETWORK_ERRORS, explain


MOST_DOWNLOADS = 4
"""Files of one component that are fetched at the same time."""


class AbstractStore(abc.ABC):
    """Named files, of which those on the Hub are fetched when they are asked for."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name that errors call it by."""

    @property
    @abc.abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Facts that tell these files from others."""

    @property
    @abc.abstractmethod
    def hint(self) -> str:
        """The end of an error, which says why a file might be missing; or nothing."""

    @abc.abstractmethod
    def exists(self, file: str) -> bool:
        """Tells whether there is such a file, without fetching it."""

    @abc.abstractmethod
    def files(self, folder: str) -> list[str]:
        """Lists the names of the files in a folder: none where there is no such folder."""

    @abc.abstractmethod
    def paths(self, files: Sequence[str]) -> list[Path]:
        """Fetches files that are not on disk; returns their paths. **Raises:** `SourceError`."""


class Folder(AbstractStore):
    """A local folder."""

    def __init__(self, root: Path):
        self._root = root

    @property
    def name(self) -> str:
        return str(self._root)

    @property
    def identity(self) -> Mapping[str, str]:
        """The folder's own name, and a hash of the headers and sizes of its safetensors files."""
        digest = hashlib.sha256()
        for file in sorted(self._root.glob("*/*.safetensors")):
            with contextlib.suppress(CheckpointError):
                fingerprint = SafetensorsFile(file).fingerprint
                digest.update(f"{file.relative_to(self._root).as_posix()} {fingerprint}\n".encode())
        return {"folder": self._root.resolve().name, "sha256": digest.hexdigest()}

    @property
    def hint(self) -> str:
        return ""

    def exists(self, file: str) -> bool:
        return (self._root / file).is_file()

    def files(self, folder: str) -> list[str]:
        try:
            return sorted(
                entry.name for entry in os.scandir(self._root / folder) if entry.is_file()
            )
        except OSError:
            return []

    def paths(self, files: Sequence[str]) -> list[Path]:
        return [self._root / file for file in files]


class Repository(AbstractStore):
    """One commit of a repository on the Hub, through the cache of `huggingface_hub`."""

    def __init__(
        self,
        repository: str,
        revision: str | None,
        *,
        offline: bool | None,
        first: str = INDEX,
    ):
        """Fetches the file `first`. **Raises:** `SourceError`, also where there is no such file."""
        self._repository, self._revision = repository, revision
        self._offline = constants.HF_HUB_OFFLINE if offline is None else offline
        # The first file is asked for by the branch or tag, so that the cache remembers its commit.
        self._root = self._fetch(first, revision)
        for _ in first.split("/"):
            self._root = self._root.parent
        self._commit = self._root.name
        self._files: list[str] | None = None if self._offline else self._list()

    @property
    def name(self) -> str:
        return self._repository

    @property
    def identity(self) -> Mapping[str, str]:
        return {"repository": self._repository, "revision": self._commit}

    @property
    def hint(self) -> str:
        return "" if self._files is not None else " in the local cache, and the Hub was not asked"

    def exists(self, file: str) -> bool:
        return (self._root / file).is_file() if self._files is None else file in self._files

    def files(self, folder: str) -> list[str]:
        if self._files is None:
            return Folder(self._root).files(folder)
        paths = [file.rpartition("/") for file in self._files]
        return sorted(name for parent, _, name in paths if parent == folder)

    def paths(self, files: Sequence[str]) -> list[Path]:
        if len(files) < 2:
            return [self._fetch(file, self._commit) for file in files]
        with ThreadPoolExecutor(MOST_DOWNLOADS) as threads:
            return list(threads.map(lambda file: self._fetch(file, self._commit), files))

    def _fetch(self, file: str, revision: str | None) -> Path:
        try:
            path = huggingface_hub.hf_hub_download(
                self._repository,
                file,
                revision=revision,
                local_files_only=self._offline,
                library_name="eqxdiff",
            )
        except Exception as error:
            raise self._explain(error, file) from error
        return Path(path)

    def _list(self) -> list[str] | None:
        """Lists every file of the commit; `None` where the Hub cannot be reached."""
        api = huggingface_hub.HfApi(library_name="eqxdiff")
        try:
            return api.list_repo_files(self._repository, revision=self._commit)
        except errors.HfHubHTTPError as error:
            raise self._explain(error, INDEX) from error
        except NETWORK_ERRORS:
            return None

    def _explain(self, error: Exception, file: str) -> Exception:
        return explain(error, self._repository, self._revision, file, offline=self._offline)
