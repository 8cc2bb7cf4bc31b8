"""Opens a checkpoint of any layout, of which nothing but headers and configs is read."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._errors import SettingError, SourceError
from ..checkpoint import Table
from ..hub import Source, is_file, open_part, open_source
from ..models import Family, Lookalikes, find_model
from ..tensors import PICKLES, AbstractTensorSource, dequantised, open_tensors
from .recognise import claim, denoisers, describe, locate


FLAX = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
TORCH = ("diffusion_pytorch_model.bin", "pytorch_model.bin")


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

    - `model`: the model that it is taken for; others may have the same header.
    - `components`: the components that it has.
    - `configs`: where configs and tokenizers come from.
    - `stamp`: tells these files from others that have the same headers: the commit of a repository,
        or when each local file was last changed.
    """

    name: str
    model: str
    family: Family
    components: Mapping[str, Opened]
    configs: Source
    stamp: str

    @property
    def missing(self) -> list[str]:
        """The components of the model that the checkpoint lacks."""
        return [name for name in self.family.components if name not in self.components]

    @property
    def alike(self) -> list[str]:
        """The other models whose files look the same."""
        sort = self.family.files.of(self.model)
        return [] if sort is None else [name for name in sort.models if name != self.model]

    @property
    def fingerprint(self) -> str:
        """A hash of the stamp and of all names, shapes and dtypes."""
        infos = {
            name: [
                (key, *info.shape, str(info.dtype)) for key, info in part.tensors.tensors.items()
            ]
            for name, part in self.components.items()
        }
        text = json.dumps([self.name, self.model, self.configs.name, self.stamp, infos])
        return hashlib.sha256(text.encode()).hexdigest()

    def completed(self) -> "Checkpoint":
        """Adds the missing components from the place of the configs. **Raises:** `SourceError`."""
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
    """Opens a checkpoint that is to be converted.

    **Arguments:**

    - `spec`: a folder or Hub repository in the diffusers layout, with weights of PyTorch or Flax,
        or a single file of any layout: a path or `REPOSITORY:FILE`.
    - `model`: the name of the model, needed where the header does not tell it.
    - `configs`: a folder or repository with the configs of a single file, by default the model's
        own repository.
    - `revision`: a branch, tag or commit of the repository.
    - `pickle`: whether pickles may be read: their tensors and nothing else.

    **Raises:** `SourceError`, `ConfigError`, or `CheckpointError`, with everything that is left
    over in a single file or does not fit; `SettingError` where `model` is needed.
    """
    if is_file(spec):
        return _open_file(spec, model, configs, revision, pickle)
    if configs is not None:
        raise SettingError(f"{spec} has configs of its own: `configs` would be ignored.")
    source = open_source(spec, revision=revision)
    find = functools.cache(lambda name: source_tensors(source, name, pickle=pickle))
    if model is None:
        folders = (name for name in denoisers() if source.exists(f"{name}/config.json"))
        denoiser = next(folders, None)
        model = _guess(None if denoiser is None else describe(find(denoiser)), spec)
    family, _ = find_model(model)
    components = {}
    for name, component in family.components.items():
        skeleton = component.skeleton(_config(family, source, name))
        components[name] = Opened(*locate(find(name), component.table, skeleton), skeleton)
    return Checkpoint(spec, model, family, components, source, _stamp(source))


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
    stamp = _stamp(part.source, part.path()) + _stamp(source)
    return Checkpoint(spec, model, family, components, source, stamp)


def _stamp(source: Source, file: Path | None = None) -> str:
    """Identifies a folder or repository, or one file of it."""
    root = Path(source.name)
    if not root.is_dir():
        return repr((file, dict(source.identity)))
    files = sorted(root.rglob("*")) if file is None else [file]
    return repr([(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file()])


def _guess(kind: Lookalikes | None, spec: str) -> str:
    if kind is None:
        raise SettingError(f"{spec} does not tell which model it is of: name it with `model`.")
    if not kind.models:
        raise SettingError(f"{spec} holds {kind.summary}, which is not supported.")
    return kind.models[0]


def _config(family: Family, source: Source, name: str) -> Any:
    return family.components[name].parse(plain(source.read_json(f"{name}/config.json")))


def source_tensors(source: Source, part: str, *, pickle: bool = False) -> AbstractTensorSource:
    """Opens the weights of a component of a folder, whether PyTorch or Flax wrote them.

    **Raises:** `SourceError`, `CheckpointError`.
    """
    others = [*FLAX, *(TORCH if pickle else ())]
    found = [f"{part}/{name}" for name in others if source.exists(f"{part}/{name}")]
    try:
        return source.tensors(part)
    except SourceError:
        if not found:
            raise
    return open_tensors(source.path(found[0]), pickle=pickle)


def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a config of the Flax classes into one of the classes that took their place."""
    return {key: _plain(value) for key, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.removeprefix("Flax") if isinstance(value, str) else value
