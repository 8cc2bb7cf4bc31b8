"""Where a model's files come from: a folder in diffusers layout, or a repository on the Hub."""

import abc
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from .._errors import CheckpointError, ConfigError, SourceError
from ..tensors import PICKLES, AbstractTensorSource, SafetensorsFile
from ..tensors.safetensors import merge_shards, read_index


INDEX = "model_index.json"
"""The file at the root of every model in diffusers layout."""

WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)"
    r"(?:(?P<index>\.safetensors\.index(?:\.(?P<late>\w+))?\.json|\.(?P<early>\w+)\.safetensors\.index\.json)"
    r"|(?:\.(?P<variant>\w+))?\.safetensors)"
)
"""The names that diffusers and transformers give to the safetensors files of a component."""

HEAVY = (".safetensors", *PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".pb")

NETWORK_ERRORS = (
    errors.HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    errors.OfflineModeIsEnabled,
)
"""The errors of the library's HTTP client when there is no answer. The client depends on the
library's version."""

MOST_DOWNLOADS = 4
"""Files of one component that are fetched at the same time."""

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


def explain(
    error: Exception, repository: str, revision: str | None, file: str, *, offline: bool
) -> Exception:
    """Turns an exception of `huggingface_hub` into one clear sentence, or returns it as it is.

    The Hub answers 401 to an anonymous and 403 to a known user; a gated repository has the error
    code `GatedRepo`, and only the text says what a token lacks.
    """
    page = f"https://huggingface.co/{repository}"
    tokens = "https://huggingface.co/settings/tokens"
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError):
        if isinstance(cause, errors.HfHubHTTPError):
            return explain(cause, repository, revision, file, offline=offline)
        if offline or isinstance(cause, errors.OfflineModeIsEnabled):
            return SourceError(
                f"{file} of {repository}{_at(revision)} is not in the local cache, and the Hub is "
                "not asked because of offline mode (HF_HUB_OFFLINE); download it once while online."
            )
        return SourceError(
            f"The Hub cannot be reached at {constants.ENDPOINT} and {file} of {repository}"
            f"{_at(revision)} is not in the local cache; check the network, or give a local folder."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{repository} has no branch, tag or commit {revision!r}; see {page}.")
    if isinstance(error, errors.EntryNotFoundError):
        what = "which every model in the diffusers layout has" if file == INDEX else f"see {page}"
        return SourceError(f"{repository}{_at(revision)} has no {file}, {what}.")
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{repository!r} is not a name that a Hub repository can have.")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, repository, page, tokens)
    if isinstance(error, NETWORK_ERRORS):
        return SourceError(
            f"The Hub cannot be reached at {constants.ENDPOINT} ({error}); check the network."
        )
    if isinstance(error, OSError):
        return SourceError(
            f"{file} of {repository} cannot be stored in {constants.HF_HUB_CACHE}: "
            f"{error.strerror or error}."
        )
    return error


def _explain_status(
    error: errors.HfHubHTTPError, repository: str, page: str, tokens: str
) -> SourceError:
    status = error.response.status_code
    said = f"{error.response.headers.get('X-Error-Message', '')} {error}".lower()
    token = huggingface_hub.get_token() is not None
    if "expired" in said:
        return SourceError(f"Your Hub token has expired; make a new one at {tokens} and log in.")
    if "invalid credentials" in said or ("invalid username or password" in said and token):
        return SourceError(f"The Hub does not know your token; make a new one at {tokens}.")
    if "fine-grained" in said:
        return SourceError(
            f"{repository} is gated and your fine-grained token may not read gated repositories; "
            f"enable that for the token at {tokens}."
        )
    if isinstance(error, errors.GatedRepoError):
        if status == 401 or not token:
            return SourceError(
                f"{repository} is gated and you are not logged in; accept its licence at {page}, "
                "then run `hf auth login` or set HF_TOKEN."
            )
        return SourceError(
            f"{repository} is gated and your account has no access to it; accept its licence at "
            f"{page} with the account that your token belongs to."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "the rights of your token" if token else "log in with `hf auth login`"
        return SourceError(
            f"There is neither a folder nor a Hub repository {repository}; check the spelling, or "
            f"if it is private, {private}."
        )
    if isinstance(error, errors.DisabledRepoError):
        return SourceError(f"{repository} has been disabled on the Hub; see {page}.")
    if status == 429:
        return SourceError("The Hub refuses more requests for now; wait some minutes, or log in.")
    if status >= 500:
        return SourceError(f"The Hub fails with status {status}; try again later.")
    text = error.response.headers.get("X-Error-Message") or f"status {status}"
    return SourceError(f"The Hub refuses {repository}: {text.rstrip('.')}; see {page}.")


def _within(folder: str, name: str) -> str:
    return "/".join(filter(None, (folder, name)))


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision}"


class Source:
    """The files of a model in diffusers layout: a folder for each component, and an index.

    Paths within it are relative, with forward slashes: `transformer/config.json`.
    """

    def __init__(self, store: AbstractStore):
        self._store = store

    @property
    def name(self) -> str:
        """The folder's path or the repository's name."""
        return self._store.name

    @property
    def identity(self) -> Mapping[str, str]:
        """Tells these weights from others: repository and commit, or folder and hash of headers."""
        return self._store.identity

    def exists(self, file: str) -> bool:
        """Tells whether there is such a file; it is not downloaded."""
        return self._store.exists(file)

    def path(self, file: str) -> Path:
        """Returns a file on disk, downloaded if need be. **Raises:** `SourceError`."""
        if not self._store.exists(file):
            raise SourceError(f"{self.name} has no {file}{self._store.hint}.")
        return self._store.paths([file])[0]

    def read_json(self, file: str) -> dict[str, Any]:
        """Reads a JSON object. **Raises:** `SourceError` where it is missing, `ConfigError`."""
        path = self.path(file)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError):
            raise ConfigError(f"{path} is damaged: it is not valid JSON.") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path} is damaged: it is not a JSON object.")
        return fields

    def folder(self, part: str) -> Path:
        """Fetches all files of a component but its weights, and returns their folder on disk.

        **Raises:** `SourceError`.
        """
        files = [name for name in self._store.files(part) if not name.endswith(HEAVY)]
        if not files:
            raise SourceError(f"{self.name} has no {part}{self._store.hint}.")
        return self._store.paths([_within(part, name) for name in files])[0].parent

    def weight_files(self, part: str, *, variant: str | None = None) -> list[str]:
        """Names the safetensors file of a component, or the index of its shards and the shards.

        **Arguments:**

        - `variant`: such as `"fp16"`, part of the files' names. Without one the plain files are
          meant; where there are only those of one variant, they are taken, where diffusers would
          want the variant to be named.

        **Raises:** `SourceError` where there are none or where it is not clear which are meant.
        """
        names = self._store.files(part)
        where = _within(self.name, part)
        found: dict[str | None, list[str]] = {}
        for name in names:
            if match := WEIGHTS.fullmatch(name):
                kind = match["variant"] or match["late"] or match["early"]
                found.setdefault(kind, []).append(name)
        if variant not in found and variant is None and len(found) == 1:
            variant = next(iter(found))
        if variant not in found:
            raise SourceError(self._no_weights(where, names, found, variant))
        # diffusers prefers the shards where there is a single file too, transformers that file
        single = sorted(name for name in found[variant] if name.endswith(".safetensors"))
        index = sorted(name for name in found[variant] if name.endswith(".json"))
        first_index = any(name.startswith("diffusion") for name in index)
        choice = (index + single if first_index else single + index)[0]
        if choice.endswith(".safetensors"):
            return [_within(part, choice)]
        path = self.path(_within(part, choice))
        weight_map = read_index(path.read_bytes(), str(path))
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if shard not in names]:
            raise SourceError(
                f"{where} lacks {len(missing)} of the {len(shards)} files that {choice} lists"
                f"{self._store.hint}: {', '.join(missing[:4])}{', ...' if missing[4:] else ''}."
            )
        return [_within(part, name) for name in (choice, *shards)]

    def tensors(self, part: str, *, variant: str | None = None) -> AbstractTensorSource:
        """Opens the weights of a component, downloaded if need be.

        **Arguments:** as of `weight_files`.

        **Raises:** `SourceError`; `CheckpointError` where a file is damaged.
        """
        files = self.weight_files(part, variant=variant)
        paths = self._store.paths(files)
        if len(paths) == 1:
            return SafetensorsFile(paths[0])
        index, *shards = paths
        weight_map = read_index(index.read_bytes(), str(index))
        opened = {shard.name: SafetensorsFile(shard) for shard in shards}
        return merge_shards(weight_map, opened, str(index))

    def _no_weights(
        self,
        where: str,
        names: Sequence[str],
        found: Mapping[str | None, Sequence[str]],
        variant: str | None,
    ) -> str:
        if found:
            kinds = ", ".join(sorted(kind or "plain" for kind in found))
            wanted = "plain" if variant is None else variant
            return f"{where} has no {wanted} weights, only these variants: {kinds}; name one."
        if pickles := [name for name in names if name.endswith(PICKLES)]:
            return (
                f"{where} has its weights only as a pickle ({pickles[0]}), which can run any code "
                "when it is opened; `eqxdiff convert --pickle` reads its tensors and nothing else, "
                "or convert it with https://huggingface.co/spaces/safetensors/convert."
            )
        if flax := [name for name in names if name.endswith(".msgpack")]:
            return (
                f"{where} has its weights only for Flax ({flax[0]}); `eqxdiff convert` makes a "
                "folder of safetensors of it."
            )
        return f"{where} has no safetensors weights{self._store.hint}."


def open_source(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool | None = None,
    first: str = INDEX,
) -> Source:
    """Opens a local folder in diffusers layout, or a repository on the Hub.

    Of a repository only `model_index.json` is downloaded at once, other files when they are asked
    for. The cache, token and endpoint are those of `huggingface_hub` (`HF_HOME`, `HF_TOKEN`,
    `HF_ENDPOINT`).

    **Arguments:**

    - `name_or_path`: an existing folder, else a repository such as
      `"black-forest-labs/FLUX.1-dev"` or its address on the Hub.
    - `revision`: branch, tag or commit of a repository.
    - `offline`: use only what is in the cache; `HF_HUB_OFFLINE` by default.
    - `first`: the file of a repository that is downloaded at once and must exist. That of a single
      component is `config.json`.

    **Raises:** `SourceError`, which tells apart what is missing and what may not be read.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if text and path.is_dir():
        if revision is not None:
            raise SourceError(f"{text} is a local folder, which has no revision {revision!r}.")
        return Source(Folder(path))
    if text and path.exists():
        raise SourceError(f"{text} is a file, but a folder in the diffusers layout is expected.")
    repository = re.sub(r"^https://(huggingface\.co|hf\.co)/|/$", "", text)
    if not isinstance(name_or_path, str) or not REPOSITORY.fullmatch(repository):
        raise SourceError(
            f"There is no folder {text}; give a folder in the diffusers layout, or a Hub "
            "repository as OWNER/NAME."
        )
    return Source(Repository(repository, revision, offline=offline, first=first))
