"""Where adapters come from: a file, a folder, or a repository on the Hub."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from .._errors import SourceError
from ..hub import Source, open_source
from ..hub.explain import explain
from ..hub.source import REPOSITORY
from ..hub.stores import Folder
from ..tensors import PICKLES, SafetensorsFile
from .adapter import Adapter, parse_adapter
from .components import NamedFamily
from .strength import Strength, split_spec


USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The names that diffusers and PEFT give to the file of an adapter."""

CONFIG = "adapter_config.json"
MOST_NAMES = 8


def load(
    spec: str, *, revision: str | None = None, families: Sequence[NamedFamily] | None = None
) -> Adapter:
    """Opens an adapter. Its matrices stay in the file until they are needed.

    **Arguments:**

    - `spec`: a `.safetensors` file, a folder or Hub repository that holds one, or
        `REPOSITORY:FILE`. A strength may follow after `@`, as in `style.safetensors@0.8` or
        `style.safetensors@0.8,COMPONENT=0.4`. A file or folder on disk is preferred to a
        repository.
    - `revision`: branch, tag or commit of the repository.
    - `families`: the families whose formats are recognised; all by default.

    **Raises:** `SourceError` where there is no such file, `CheckpointError` where the file is no
    adapter or is damaged, `SettingError` where its strength is no number.
    """
    whole = bool(spec) and Path(spec).expanduser().exists()
    text, strength = (spec, None) if whole else split_spec(spec)
    source, file = _open(text, revision)
    config = source.read_json(_beside(file, CONFIG)) if _has_config(source, file) else None
    path = source.path(file)
    weights = SafetensorsFile(path, name=_name(text, file))
    adapter = parse_adapter(
        weights,
        name=_name(text, file),
        metadata=weights.metadata,
        config=config,
        families=families,
    )
    with open(path, "rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    return dataclasses.replace(adapter, sha256=digest, strength=strength or Strength())


def _open(text: str, revision: str | None) -> tuple[Source, str]:
    path = Path(text).expanduser()
    if text and path.is_file():
        return Source(Folder(path.parent)), _checked(path.name)
    if text and path.is_dir():
        return Source(Folder(path)), _only([entry.name for entry in path.iterdir()], text)
    repository, _, file = text.partition(":")
    if not REPOSITORY.fullmatch(repository):
        raise SourceError(
            f"There is no file {text}; give a safetensors file, or a Hub repository as OWNER/NAME "
            "or OWNER/NAME:FILE."
        )
    if file:
        return open_source(repository, revision=revision, first=_checked(file)), file
    if constants.HF_HUB_OFFLINE:
        for name in USUAL:
            with contextlib.suppress(SourceError):
                return open_source(repository, revision=revision, first=name), name
    file = _only(_list(repository, revision), repository)
    return open_source(repository, revision=revision, first=file), file


def _list(repository: str, revision: str | None) -> list[str]:
    api = huggingface_hub.HfApi(library_name="eqxdiff")
    try:
        return api.list_repo_files(repository, revision=revision)
    except Exception as error:
        raise explain(error, repository, revision, USUAL[0], offline=False) from error


def _only(names: Sequence[str], where: str) -> str:
    """Returns the one adapter among files. **Raises:** `SourceError` where it is not clear."""
    for name in USUAL:
        if name in names:
            return name
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        few = ", ".join(files[:MOST_NAMES])
        more = f" and {len(files) - MOST_NAMES} more" if len(files) > MOST_NAMES else ""
        raise SourceError(f"{where} has several files, name one as {where}:FILE: {few}{more}.")
    for name in names:
        _checked(name)
    raise SourceError(f"{where} has no safetensors file.")


def _checked(name: str) -> str:
    if name.endswith(PICKLES):
        raise SourceError(
            f"{name} is a pickle, which can run any code when it is opened: "
            "give a safetensors file."
        )
    return name


def _beside(file: str, name: str) -> str:
    folder, slash, _ = file.rpartition("/")
    return f"{folder}{slash}{name}"


def _has_config(source: Source, file: str) -> bool:
    """Whether a config lies beside the file. PEFT keeps alpha there; diffusers writes no config."""
    return Path(file).name == USUAL[1] and source.exists(_beside(file, CONFIG))


def _name(text: str, file: str) -> str:
    return text if text.endswith(Path(file).name) else f"{text.rstrip('/')}/{file}"
