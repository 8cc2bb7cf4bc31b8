"""From any layout to a diffusers folder or a single file, in pieces of a few megabytes."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from .._errors import SettingError, SourceError
from ..models import AbstractFamily, find_model
from .export import natural_order
from .hub import HEAVY, INDEX, PICKLES, Source, open_source
from .layout import KINDS, Kind, claim, describe, find_pieces, locate
from .load import Reader, check_copies, leaf_paths
from .part import is_file, open_part
from .plan import Move, Plan, compile_plan
from .save import cut, header, index_text
from .scaled import dequantised
from .source import AbstractTensorSource, TensorInfo
from .table import Table, read_table
from .weights import open_tensors, plain, source_tensors


CHUNK_BYTES = 16 << 20
"""A tensor is converted in pieces of this size, but for those few whose axes change places."""

METADATA = {"format": "pt"}

Progress = Callable[[str, int, int], None]
"""Called with the file that is written, the bytes written so far of all files, and all bytes."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """One component of a checkpoint: its tensors, their table, and the module's shapes."""

    tensors: AbstractTensorSource
    table: Table
    skeleton: Any


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any layout, of which nothing but headers and configs is read.

    **Fields:**

    - `model`: what it is taken for; others may have the same header.
    - `components`: those that it has.
    - `configs`: where configs and tokenizers come from.
    - `stamp`: when local files were last changed.
    """

    name: str
    model: str
    family: AbstractFamily
    components: Mapping[str, Opened]
    configs: Source
    stamp: str

    @property
    def missing(self) -> list[str]:
        """The components that the model has besides."""
        return [name for name in self.family.components if name not in self.components]

    @property
    def alike(self) -> list[str]:
        """The other models whose files look the same."""
        models = (kind.models for kind in KINDS if self.model in kind.models)
        return [name for names in models for name in names if name != self.model]

    @property
    def fingerprint(self) -> str:
        """A hash of all names, shapes and dtypes."""
        infos = {
            name: [
                (key, *info.shape, str(info.dtype)) for key, info in part.tensors.tensors.items()
            ]
            for name, part in self.components.items()
        }
        text = json.dumps([self.name, self.model, self.configs.name, infos])
        return hashlib.sha256(text.encode()).hexdigest()

    def completed(self) -> "Checkpoint":
        """With the missing components, from where the configs are. **Raises:** `SourceError`."""
        more = {}
        for name in self.missing:
            component = self.family.components[name]
            skeleton = component.skeleton(_config(self.family, self.configs, name))
            found = locate(self.configs.tensors(name), component.table, skeleton)
            more[name] = Opened(*found, skeleton)
        return dataclasses.replace(self, components={**self.components, **more})


def open_checkpoint(
    spec: str,
    *,
    model: str | None = None,
    configs: str | None = None,
    revision: str | None = None,
    pickle: bool = False,
) -> Checkpoint:
    """Opens what is to be converted.

    **Arguments:**

    - `spec`: a folder or Hub repository in the diffusers layout, with weights of PyTorch or Flax,
        or a single file of any layout: a path or `REPOSITORY:FILE`.
    - `model`: such as `"sd21-base"`, where the header does not say it.
    - `configs`: a folder or repository with the configs of a single file; by default the model's
        own repository.
    - `revision`: of the repository.
    - `pickle`: whether pickles may be read: their tensors and nothing else.

    **Raises:** `SourceError`, `ConfigError`, or `CheckpointError`, with everything that is left
    over in a single file or does not fit; `SettingError` where `model` is needed.
    """
    if is_file(spec):
        return _open_file(spec, model, configs, revision, pickle)
    if configs is not None:
        raise SettingError(f"{spec} has configs of its own: others would be ignored.")
    source = open_source(spec, revision=revision)
    find = functools.cache(lambda name: source_tensors(source, name, pickle=pickle))
    if model is None:
        folders = (name for name in ("transformer", "unet") if source.exists(f"{name}/config.json"))
        denoiser = next(folders, None)
        model = _guess(None if denoiser is None else describe(find(denoiser)), spec)
    family, _ = find_model(model)
    components = {}
    for name, component in family.components.items():
        skeleton = component.skeleton(_config(family, source, name))
        components[name] = Opened(*locate(find(name), component.table, skeleton), skeleton)
    return Checkpoint(spec, model, family, components, source, _stamp(Path(spec).expanduser()))


def _open_file(
    spec: str, model: str | None, configs: str | None, revision: str | None, pickle: bool
) -> Checkpoint:
    part = open_part(spec, revision=revision, others=pickle or not spec.endswith(PICKLES))
    tensors = dequantised(open_tensors(part.path(), pickle=pickle))
    model = model or _guess(describe(tensors), spec)
    family, preset = find_model(model)
    source = open_source(configs or preset.home)
    skeletons = {
        name: component.skeleton(_config(family, source, name))
        for name, component in family.components.items()
    }
    wanted = {name: (part.table, skeletons[name]) for name, part in family.components.items()}
    components = {
        name: Opened(piece.of(tensors), piece.key_table(), skeletons[name])
        for name, piece in claim(tensors, wanted, part.file or spec).items()
    }
    return Checkpoint(spec, model, family, components, source, _stamp(part.path()))


def _stamp(path: Path) -> str:
    files = [path, *sorted(path.rglob("*"))] if path.exists() else []
    return repr([(str(file), file.stat().st_mtime_ns) for file in files if file.is_file()])


def _guess(kind: Kind | None, spec: str) -> str:
    if kind is None:
        raise SettingError(f"{spec} does not tell which model it is of: name it with --model.")
    if not kind.models:
        raise SettingError(f"{spec} holds {kind.summary}, which is not supported.")
    return kind.models[0]


def _config(family: AbstractFamily, source: Source, name: str) -> Any:
    return family.components[name].parse(plain(source.read_json(f"{name}/config.json")))


@dataclasses.dataclass(frozen=True)
class Recast:
    """A component on its way to another layout.

    **Fields:**

    - `infos`: the tensors that it will be, in order.
    """

    name: str
    opened: Opened
    plan: Plan
    infos: Mapping[str, TensorInfo]
    moves: Mapping[str, tuple[Move, ...]]

    @classmethod
    def make(cls, name: str, opened: Opened, table: Table, dtype: DTypeLike | None) -> "Recast":
        """**Raises:** `CheckpointError` where the component does not fit the model."""
        source = opened.tensors
        leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(opened.skeleton).items()}
        file = {tensor: info.shape for tensor, info in source.tensors.items()}
        plan = compile_plan(opened.table, leaves, file, name=name)
        check_copies(source, plan, name)
        target = compile_plan(table, leaves)
        moves: dict[str, list[Move]] = {}
        for items in target.moves.values():
            for move in items:
                moves.setdefault(move.tensor, []).append(move)
        infos = {
            tensor: TensorInfo(target.shapes[tensor], _dtype(source, plan, items, dtype))
            for tensor, items in moves.items()
        }
        # wide numbers first: each tensor is then aligned to the size of its numbers in the file
        order = sorted(infos, key=lambda t: (-infos[t].dtype.itemsize, natural_order(t)))
        ordered = {t: tuple(sorted(moves[t], key=lambda move: move.start)) for t in order}
        return cls(name, opened, plan, {tensor: infos[tensor] for tensor in order}, ordered)

    def chunks(self, tensor: str, reader: Reader) -> Iterator[np.ndarray]:
        """The numbers of one of `infos` in order, a piece at a time."""
        info = self.infos[tensor]
        for move in self.moves[tensor]:
            rows = move.high - move.low
            plain = move.axes is None and move.scale is None and move.theirs[:1] == move.ours[:1]
            row = max(math.prod(move.ours[1:]) * info.dtype.itemsize, 1)
            step = max(CHUNK_BYTES // row, 1) if plain and move.ours else rows
            for low in range(move.low, move.high, step):
                high = min(low + step, move.high)
                box = ((low, high), *((0, size) for size in move.ours[1:])) if move.ours else ()
                layer = () if move.layer is None else ((move.layer, move.layer + 1),)
                piece = reader.fill(self.plan, move.leaf, (*layer, *box), info.dtype)
                piece = piece if move.layer is None else piece[0]
                yield piece if step < rows else move.to_theirs(piece)


def _dtype(
    source: AbstractTensorSource, plan: Plan, moves: list[Move], wanted: DTypeLike | None
) -> np.dtype:
    """What a tensor is written in: what was asked for, or the widest that it is made of."""
    found = [
        source.dtype_of(own.tensor)
        for move in moves
        for own in plan.moves.get(move.leaf, ())
        if own.layer == move.layer
    ]
    own = functools.reduce(jnp.promote_types, found or [source.dtype])
    floating = jnp.issubdtype(own, jnp.floating)
    return np.dtype(own if wanted is None or not floating else wanted)


@dataclasses.dataclass(frozen=True)
class Target:
    """A file to be written.

    **Fields:**

    - `path`: within the destination.
    - `tensors`: by the name in the file: whose they are.
    - `data`: of a file that is not weights.
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


def plan_folder(checkpoint: Checkpoint, dtype: DTypeLike | None = None) -> list[Target]:
    """The files of a folder in the diffusers layout, weights first. **Raises:** `CheckpointError`,
    `SourceError`."""
    targets = []
    for name, opened in checkpoint.components.items():
        component = checkpoint.family.components[name]
        recast = Recast.make(name, opened, read_table(component.table), dtype)
        stem = "model" if component.stage == "text" else "diffusion_pytorch_model"
        shards = cut(recast.infos, stem)
        targets += [
            Target(f"{name}/{file}", dict.fromkeys(shard, recast)) for file, shard in shards.items()
        ]
        if len(shards) > 1:
            index = f"{name}/{stem}.safetensors.index.json"
            targets.append(Target(index, data=index_text(shards).encode()))
    return targets + _texts(checkpoint)


def _texts(checkpoint: Checkpoint) -> list[Target]:
    """Configs and tokenizers, as the diffusers of today names its classes."""
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
            texts.append(Target(f"{part}/{path.name}", data=data))
    return [*texts, Target(INDEX, data=_json(index))]


def _json(fields: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(fields, indent=2)}\n".encode()


def plan_file(
    checkpoint: Checkpoint, path: str, dtype: DTypeLike | None = None, only: str | None = None
) -> list[Target]:
    """The original single file of the model.

    **Arguments:**

    - `only`: a component to be alone in the file, its names without a prefix.

    **Raises:** `CheckpointError`; `SettingError` where the checkpoint has no such component, or the
    model no such layout.
    """
    kind = next((kind for kind in KINDS if checkpoint.model in kind.models), None)
    if kind is None:
        raise SettingError(f"There is no single-file layout for {checkpoint.model}.")
    components = checkpoint.components
    if only is not None and only not in components:
        choices = ", ".join(components)
        raise SettingError(f"{checkpoint.name} has no component {only}: it has {choices}.")
    tensors = {}
    for name, opened in components.items():
        if only in (None, name):
            table, prefix = kind.layout[name]
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
    return [Target(path, {tensor: tensors[tensor] for tensor in order})]


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    targets: list[Target],
    progress: Progress | None = None,
) -> None:
    """Writes a folder, which appears when it is complete.

    What is written meanwhile lies in a hidden folder beside it; another attempt goes on from there.

    **Raises:** `SourceError` where the folder exists or cannot be written, `CheckpointError`.
    """
    if folder.exists():
        raise SourceError(f"{folder} exists already: name a folder that does not.")
    draft = folder.with_name(f".{folder.name}.part")
    files = [(target.path, target.nbytes) for target in targets]
    job = hashlib.sha256(f"{checkpoint.fingerprint} {files}".encode()).hexdigest()
    try:
        mark = draft / "job"
        if draft.exists() and not mark.is_file():
            raise SourceError(f"{draft} is in the way and not of an earlier attempt: remove it.")
        if draft.exists() and mark.read_text() != job:
            shutil.rmtree(draft)
        draft.mkdir(parents=True, exist_ok=True)
        mark.write_text(job)
        _write_all(draft, targets, progress)
        mark.unlink()
        draft.rename(folder)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror}.") from None


def write_file(
    checkpoint: Checkpoint,
    path: Path,
    targets: list[Target],
    progress: Progress | None = None,
) -> None:
    """Writes a single file, which appears when it is complete.

    **Raises:** `SourceError` where it exists or cannot be written, `CheckpointError`.
    """
    if path.exists():
        raise SourceError(f"{path} exists already: name a file that does not.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_all(path.parent, targets, progress)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}.") from None


def _write_all(root: Path, targets: list[Target], progress: Progress | None) -> None:
    total, done = sum(target.nbytes for target in targets), 0
    for target in targets:
        path = root / target.path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
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
        else:
            done += target.nbytes


def _pieces(target: Target) -> Iterator[bytes | memoryview]:
    """The bytes of a file; of tensors, the header first."""
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
