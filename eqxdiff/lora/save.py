"""Writing merged models and extracted adapters: in full or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import CheckpointError, SettingError
from ..checkpoint import read_table, save_module
from ..checkpoint.save import atomic, write_tensors
from ..checkpoint.table import TableFile
from ..hub import Source
from ..hub.source import HEAVY
from ..tensors import TensorInfo


def check_new(path: Path, suffix: str = "") -> None:
    """**Raises:** `SettingError` where the path exists or does not end in `suffix`."""
    if suffix and path.suffix != suffix:
        raise SettingError(f"{path} is no {suffix} file: let its name end in {suffix}.")
    if path.exists():
        raise SettingError(f"{path} exists already: give another name, or remove it.")


def save_extracted(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes an adapter. **Raises:** `CheckpointError` where it cannot be written."""
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    with atomic(path.parent) as new:
        write_tensors(new(path.name), infos, iter(tensors.items()), {"format": "pt"})


def save_merged(
    source: Source,
    load: Callable[[list[str]], Mapping[str, Any]],
    configs: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, TableFile],
    stages: Mapping[str, str],
    tokenizers: Sequence[str],
    folder: Path,
) -> None:
    """Writes a model in the layout of diffusers, one component in memory at a time.

    **Arguments:**

    - `source`: the index, the scheduler and the tokenizers are copied from it.
    - `load`: loads the components of these names, as they are to be written.
    - `configs`, `tables`, `stages`: those of the components, by name.
    - `tokenizers`: the folders of the tokenizers.

    **Raises:** `SettingError` where the folder exists, `CheckpointError` where it cannot be
    written.
    """
    check_new(folder)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir(parents=True)
        for name in ("model_index.json", "scheduler/scheduler_config.json"):
            (part / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.path(name), part / name)
        for name in tokenizers:
            _copy_light(source.folder(name), part / name)
        for name, table in tables.items():
            (part / name).mkdir()
            text = json.dumps(configs[name], indent=2) + "\n"
            (part / name / "config.json").write_text(text, encoding="utf-8")
            stem = "model" if stages[name] == "text" else "diffusion_pytorch_model"
            save_module(load([name])[name], read_table(table), part / name, stem=stem)
        os.replace(part, folder)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be written: {error.strerror}."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(part)


def _copy_light(folder: Path, target: Path) -> None:
    """Copies the files of a folder except its weights."""
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(HEAVY):
            shutil.copyfile(file, target / file.name)
