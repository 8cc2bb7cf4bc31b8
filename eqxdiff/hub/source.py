"""The files of a model in the diffusers layout, in a folder or in a repository on the Hub."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import ConfigError, SourceError
from ..tensors import PICKLES, AbstractTensorSource, SafetensorsFile
from ..tensors.safetensors import merge_shards, read_index
from .explain import INDEX
from .stores import AbstractStore, Folder, Repository


WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)"
    r"(?:(?P<index>\.safetensors\.index(?:\.(?P<late>\w+))?\.json|\.(?P<early>\w+)\.safetensors\.index\.json)"
    r"|(?:\.(?P<variant>\w+))?\.safetensors)"
)
"""The names that diffusers and transformers give to the safetensors files of a component."""

HEAVY = (".safetensors", *PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".pb")

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


def _within(folder: str, name: str) -> str:
    return "/".join(filter(None, (folder, name)))
