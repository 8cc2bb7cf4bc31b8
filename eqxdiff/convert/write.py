"""Plans the files of a diffusers folder or a single file, and writes them."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jaxtyping import DTypeLike

from .._errors import SettingError, SourceError
from ..checkpoint import read_table
from ..checkpoint.read import Reader
from ..checkpoint.save import cut, header, index_text
from ..hub.explain import INDEX
from ..hub.source import HEAVY
from ..tensors import TensorInfo
from .open import Checkpoint, plain
from .recast import Recast
from .recognise import find_pieces


METADATA = {"format": "pt"}

Progress = Callable[[str, int, int], None]
"""Called with the name of the file, the bytes written so far of all files, and all bytes."""


@dataclasses.dataclass(frozen=True)
class OutputFile:
    """A file to be written.

    **Fields:**

    - `path`: within the destination.
    - `tensors`: the name of each tensor in the file -> its component.
    - `data`: the bytes of a file without tensors.
    """

    path: str
    tensors: Mapping[str, Recast] = dataclasses.field(default_factory=dict)
    data: bytes = b""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: part.infos[name] for name, part in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values()) + len(self.data)


def plan_folder(checkpoint: Checkpoint, dtype: DTypeLike | None = None) -> list[OutputFile]:
    """Plans the files of a folder in the diffusers layout, weights first.

    **Raises:** `CheckpointError`, `SourceError`.
    """
    targets = []
    for name, opened in checkpoint.components.items():
        component = checkpoint.family.components[name]
        recast = Recast.make(name, opened, read_table(component.table), dtype)
        stem = "model" if component.stage == "text" else "diffusion_pytorch_model"
        shards = cut(recast.infos, stem)
        targets += [
            OutputFile(f"{name}/{file}", dict.fromkeys(shard, recast))
            for file, shard in shards.items()
        ]
        if len(shards) > 1:
            index = f"{name}/{stem}.safetensors.index.json"
            targets.append(OutputFile(index, data=index_text(shards).encode()))
    return targets + _texts(checkpoint)


def _texts(checkpoint: Checkpoint) -> list[OutputFile]:
    """Plans the configs and tokenizers, with the class names of today's diffusers."""
    source, family = checkpoint.configs, checkpoint.family
    index = plain(source.read_json(INDEX))
    parts = [*family.components, *family.tokenizers, "scheduler"]
    for name, value in index.items():
        if isinstance(value, list) and name not in parts:
            index[name] = [None, None]  # such as a safety checker, which is not converted
    texts = []
    for part in parts:
        for path in sorted(source.folder(part).iterdir()):
            if not path.is_file() or path.name.endswith((*HEAVY, ".index.json")):
                continue
            data = path.read_bytes()
            if path.name in ("config.json", "scheduler_config.json"):
                data = _json(plain(source.read_json(f"{part}/{path.name}")))
            texts.append(OutputFile(f"{part}/{path.name}", data=data))
    return [*texts, OutputFile(INDEX, data=_json(index))]


def _json(fields: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(fields, indent=2)}\n".encode()


def plan_file(
    checkpoint: Checkpoint, path: str, dtype: DTypeLike | None = None, only: str | None = None
) -> list[OutputFile]:
    """Plans the original single file of the model.

    **Arguments:**

    - `only`: one component that alone is written, its names without a prefix.

    **Raises:** `CheckpointError`; `SettingError` where the checkpoint has no such component, or the
    model no such layout.
    """
    sort = checkpoint.family.files.of(checkpoint.model)
    if sort is None:
        raise SettingError(f"There is no single-file layout for {checkpoint.model}.")
    components = checkpoint.components
    if only is not None and only not in components:
        choices = ", ".join(components)
        raise SettingError(f"{checkpoint.name} has no component {only}: it has {choices}.")
    tensors = {}
    for name, opened in components.items():
        if only in (None, name):
            table, prefix = sort.layout[name]
            prefixes = (prefix if only is None else "",)
            table = dataclasses.replace(read_table(table), prefix=prefixes)
            recast = Recast.make(name, opened, table, dtype)
            tensors.update(dict.fromkeys(recast.infos, recast))
    pieces, rest = find_pieces(tensors)
    if rest or len(pieces) < (len(components) if only is None else 1):
        raise SettingError(
            f"{checkpoint.name} cannot be a single file: it has other layers than "
            f"{checkpoint.model} has, and there is no layout for those."
        )
    # wide numbers first, as within a component
    order = sorted(tensors, key=lambda tensor: -tensors[tensor].infos[tensor].dtype.itemsize)
    return [OutputFile(path, {tensor: tensors[tensor] for tensor in order})]


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    targets: list[OutputFile],
    progress: Progress | None = None,
) -> None:
    """Writes a folder, which appears when it is complete.

    The files are written into a hidden folder beside it. Where this was interrupted, another
    conversion of the same files to the same files goes on from there.

    **Raises:** `SourceError` where the folder exists, cannot be written, or is being written by
    another process; `CheckpointError`.
    """
    _refuse_existing(folder, "a folder")
    draft = folder.with_name(f".{folder.name}.part")
    mark = draft / "job"
    files = [(target.path, target.nbytes) for target in targets]
    job = hashlib.sha256(f"{checkpoint.fingerprint} {files}".encode()).hexdigest()
    try:
        if draft.exists() and not mark.is_file():
            raise SourceError(f"{draft} is in the way and not of an earlier attempt: remove it.")
        draft.mkdir(parents=True, exist_ok=True)
        with _locked(mark, folder) as file:
            _refuse_existing(folder, "a folder")  # another process may have finished meanwhile
            if file.read() != job:
                _empty(draft, mark)
                file.seek(0)
                file.truncate()
                file.write(job)
                file.flush()
            _write_all(draft, targets, progress, "part")
            mark.unlink()
            draft.rename(folder)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror}.") from None


def write_file(
    checkpoint: Checkpoint,
    path: Path,
    targets: list[OutputFile],
    progress: Progress | None = None,
) -> None:
    """Writes a single file, which appears when it is complete.

    **Raises:** `SourceError` where it exists or cannot be written, `CheckpointError`.
    """
    _refuse_existing(path, "a file")
    try:
        # an ending of its own, as another process may be writing a file of the same name
        _write_all(path.parent, targets, progress, f"{secrets.token_hex(4)}.part")
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}.") from None


def _refuse_existing(path: Path, what: str) -> None:
    if path.exists():
        raise SourceError(f"{path} exists already: name {what} that does not.")


@contextlib.contextmanager
def _locked(mark: Path, folder: Path) -> Iterator[TextIO]:
    """Opens a file for this process alone. **Raises:** `SourceError` where another has it open."""
    with open(mark, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceError(f"Another conversion is writing {folder}: wait for it.") from None
        file.seek(0)
        yield file


def _empty(draft: Path, mark: Path) -> None:
    """Removes what another conversion has left."""
    for entry in draft.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry != mark:
            entry.unlink()


def _write_all(
    root: Path, targets: list[OutputFile], progress: Progress | None, ending: str
) -> None:
    """Writes each file under a hidden name with this ending, and then gives it its own name."""
    total, done = sum(target.nbytes for target in targets), 0
    for target in targets:
        path = root / target.path
        if path.exists():
            done += target.nbytes
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{ending}")
        try:
            with open(part, "wb") as file:
                for index, piece in enumerate(_pieces(target)):
                    file.write(piece)
                    if target.tensors and index == 0:
                        continue  # the header is not counted
                    done += len(piece)
                    if progress is not None:
                        progress(target.path, done, total)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _pieces(target: OutputFile) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a file: where it holds tensors, the header first."""
    if not target.tensors:
        yield target.data
        return
    yield header(target.infos, METADATA)
    readers: dict[str, Reader] = {}
    with contextlib.ExitStack() as stack:
        for tensor, recast in target.tensors.items():
            if recast.name not in readers:
                reader = Reader(recast.opened.tensors, recast.name)
                readers[recast.name] = stack.enter_context(reader)
            written = 0
            for chunk in recast.chunks(tensor, readers[recast.name]):
                written += chunk.nbytes
                yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            assert written == recast.infos[tensor].nbytes
