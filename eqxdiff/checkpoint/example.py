"""Tiny random checkpoints in the published layouts: to try a program, not a model."""

import json
import os
import secrets
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from .._errors import SourceError
from ..models import find_model
from .save import save_module
from .table import read_table


def write_example(
    model: str,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Path:
    """Writes a tiny model of random weights, complete with configs and tokenizers.

    **Raises:** `SettingError` for an unknown model; `SourceError` where the folder exists already
    or cannot be written. Either the whole folder appears or nothing.
    """
    family, _ = find_model(model)
    folder = Path(folder)
    if folder.exists():
        raise SourceError(f"{folder} exists already: name a folder that does not.")
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    files = family.example(model)
    try:
        for path, text in files.items():
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            (draft / path).write_text(text, encoding="utf-8")
        for i, (name, component) in enumerate(family.components.items()):
            config = component.parse(json.loads(files[f"{name}/config.json"]))
            key = jax.random.fold_in(jax.random.key(seed), i)
            module = component.init(config, key=key, dtype=dtype)
            stem = "model" if component.stage == "text" else "diffusion_pytorch_model"
            save_module(module, read_table(component.table), draft / name, stem=stem)
        draft.rename(folder)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
