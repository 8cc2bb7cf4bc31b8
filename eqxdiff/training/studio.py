"""The model that a run trains: begun, completed for sampling, and written as a folder."""

import dataclasses
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._errors import CheckpointError, SettingError
from ..checkpoint import load_module, read_table, save_module
from ..hub import open_source
from ..pipeline import Blueprint, open_model
from ..vae import AutoencoderKL
from .config import TrainConfig
from .step import select, widen


@dataclasses.dataclass(frozen=True)
class Studio:
    """A model's configs and tokenizers, and the modules that training begins with.

    **Fields:**

    - `modules`: those that the objective needs, in float32.
    - `trained`: which of their leaves are trained.
    - `vae`: the finished autoencoder, where it is not itself trained.
    """

    blueprint: Blueprint
    modules: dict[str, Any]
    trained: PyTree
    vae: AutoencoderKL | None

    @property
    def whole(self) -> bool:
        """Whether it is the denoiser that is trained, not the autoencoder."""
        return self.vae is not None


def open_studio(config: TrainConfig) -> Studio:
    """Reads the configs and tokenizers, and makes or loads the modules.

    **Raises:** `SettingError`, `SourceError`, `ConfigError` or `CheckpointError`.
    """
    plan = open_model(config.model.name, config.model.folder)
    given = dict(config.model.weights)
    if unknown := given.keys() - plan.family.components.keys():
        raise SettingError(f"model.weights: there is no component {min(unknown)}.")
    alone = any(pattern.startswith("vae") for pattern in config.model.train)
    if not alone and "vae" not in given:
        raise SettingError("model.weights: a denoiser needs a finished vae: name its folder.")
    configs, modules = dict(plan.configs), {}
    for index, (name, component) in enumerate(plan.family.components.items()):
        if alone and name != "vae":
            continue
        if name in given:
            source = open_source(given[name], first="config.json")
            configs[name] = component.parse(source.read_json("config.json"))
            modules[name] = load_module(
                source.tensors(""),
                read_table(component.table),
                component.skeleton(configs[name]),
                dtype=jnp.float32,
                name=name,
            )
        else:
            key = jax.random.fold_in(jax.random.key(config.run.seed), index)
            modules[name] = eqx.filter_jit(component.init)(configs[name], key=key)
    model = plan.family.bind(plan.name, plan.model.defaults, configs)
    plan = dataclasses.replace(plan, configs=configs, model=model)
    vae = None if alone else modules.pop("vae")
    modules = zeroed(modules, config.model.zero)
    if config.model.remat:
        modules = {name: with_remat(module) for name, module in modules.items()}
    try:
        trained = select(modules, config.model.train)
    except ValueError as error:
        raise SettingError(f"model.train: {error}") from None
    return Studio(plan, modules, trained, vae)


def zeroed(modules: dict[str, Any], patterns: tuple[str, ...]) -> dict[str, Any]:
    """The modules with zeros in the leaves whose path matches. **Raises:** `SettingError`."""
    try:
        zero = select(modules, patterns)
    except ValueError as error:
        raise SettingError(f"model.zero: {error}") from None
    return jax.tree.map(lambda x, wanted: jnp.zeros_like(x) if wanted else x, modules, zero)


def with_remat(module: Any) -> Any:
    """The module with its blocks recomputed in the backward pass, where it offers that."""
    offers = any(field.name == "remat" for field in dataclasses.fields(module))
    return dataclasses.replace(module, remat=True) if offers else module


def measured(vae: AutoencoderKL, images: np.ndarray) -> AutoencoderKL:
    """The autoencoder with the shift and scale that give its latents of these images mean 0 and
    variance 1."""
    latents = np.asarray(encode_images(vae, images), np.float64)
    z = latents / vae.scaling_factor + vae.shift_factor
    shift, scale = float(z.mean()), float(1 / z.std())
    return dataclasses.replace(vae, shift_factor=round(shift, 6), scaling_factor=round(scale, 6))


def encode_images(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """The normalised means of the images' latents, `(n, h, w, c)` in float32."""
    pad = -len(images) % batch
    padded = np.concatenate([images, np.repeat(images[-1:], pad, axis=0)])
    parts = [_encode(vae, padded[i : i + batch]) for i in range(0, len(padded), batch)]
    return np.concatenate([np.asarray(part) for part in parts])[: len(images)]


@eqx.filter_jit
def _encode(vae: AutoencoderKL, images: Any) -> Any:
    return jax.vmap(lambda image: vae.normalize(vae.encode(image).mean))(images)


@eqx.filter_jit
def reconstruct(vae: AutoencoderKL, images: Any) -> Any:
    """The images from the means of their latents, in [0, 1]."""
    one = lambda image: vae.decode(vae.normalize(vae.encode(image).mean))
    return jnp.clip(jax.vmap(one)(images) / 2 + 0.5, 0, 1)


def write_model(
    studio: Studio,
    modules: Mapping[str, Any],
    config: TrainConfig,
    folder: Path,
) -> None:
    """Writes the modules with their configs and tokenizers, in place of what the folder held.

    **Raises:** `CheckpointError` where it cannot be written; what was there stays.
    """
    plan = studio.blueprint
    template, draft = Path(config.model.folder), folder.with_name(f".{secrets.token_hex(4)}")
    given = dict(config.model.weights)
    narrow = jnp.dtype(config.model.save_dtype)
    cast = lambda x: x.astype(narrow) if eqx.is_inexact_array(x) else x
    try:
        shutil.copytree(template, draft, ignore=shutil.ignore_patterns("*.safetensors*"))
        for name, module in modules.items():
            component = plan.family.components[name]
            stem = "model" if component.stage == "text" else "diffusion_pytorch_model"
            table = read_table(component.table)
            save_module(jax.tree.map(cast, module), table, draft / name, stem=stem)
            path = draft / name / "config.json"
            own = Path(given[name]) / "config.json" if name in given else path
            fields = json.loads(own.read_text(encoding="utf-8"))
            if isinstance(module, AutoencoderKL):
                fields["scaling_factor"] = module.scaling_factor
                fields["shift_factor"] = module.shift_factor
            path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        old = folder.with_name(f".{secrets.token_hex(4)}")
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        where = error.filename or folder
        raise CheckpointError(f"{where} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def split(studio: Studio) -> tuple[PyTree, PyTree]:
    """The modules as what is trained, in float32, and what is not."""
    params, frozen = eqx.partition(studio.modules, studio.trained)
    return jax.tree.map(widen, params), frozen
