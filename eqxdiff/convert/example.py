"""Tiny random checkpoints in the published layouts: to try a program, not a model."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from .._errors import SourceError
from ..checkpoint import read_table, save_module
from ..checkpoint.load import dotted
from ..models import find_model
from ..sharding import Rule, logical_axes


Module = TypeVar("Module")


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
            rng = np.random.default_rng([seed, i])
            module = randomised(component.skeleton(config, dtype), component.rules, rng)
            stem = "model" if component.stage == "text" else "diffusion_pytorch_model"
            save_module(module, read_table(component.table), draft / name, stem=stem)
        draft.rename(folder)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def randomised(skeleton: Module, rules: Sequence[Rule], rng: np.random.Generator) -> Module:
    """Fills a skeleton with random numbers that keep signals at their size.

    It needs no compiling. A component's own `init` does, which would take most of the time here.
    """

    def leaf(entries: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        path = dotted(entries)
        layers = logical_axes(path, len(shape.shape), rules).count("layers")
        own = shape.shape if len(shape.shape) == 4 else shape.shape[layers:]  # 4: of a convolution
        if len(own) > 1:
            values = rng.standard_normal(shape.shape) / math.sqrt(math.prod(own[1:]))
        else:
            values = np.full(shape.shape, float(path.endswith("weight")))
        return values.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, skeleton)
