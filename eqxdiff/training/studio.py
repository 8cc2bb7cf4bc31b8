"""The model that a run trains: opened, its images encoded and decoded, and written as a folder."""

import contextlib
import dataclasses
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from .._dtypes import float32_products
from .._errors import CheckpointError, SettingError
from ..checkpoint import read_table, save_module
from ..checkpoint.load import dotted
from ..distributed import is_first, reshard, to_host
from ..models import find_model
from ..pipeline import Blueprint, open_model
from ..sharding import Rule, parameter_sharding
from ..vae import AutoencoderKL
from .config import TrainConfig
from .step import select


@dataclasses.dataclass(frozen=True)
class Studio:
    """All of a model but the parameters that are trained.

    **Fields:**

    - `blueprint`: configs, tokenizers, and where the weights of given components are.
    - `frozen`: the modules that the objective needs, without the trained parameters.
    - `vae`: the finished autoencoder; `None` where the autoencoder is trained.
    - `settings`: the settings that the denoiser is trained for; `None` where the autoencoder is
        trained.
    """

    blueprint: Blueprint
    frozen: PyTree
    vae: AutoencoderKL | None
    settings: Any


def open_studio(config: TrainConfig, mesh: Mesh | None = None) -> tuple[Studio, PyTree]:
    """Reads the configs and tokenizers, and loads the given components. The others begin at random.

    **Arguments:**

    - `mesh`: spreads the components over devices, by their sharding rules.

    **Returns:** the studio and the trained parameters, in float32.

    **Raises:** `SettingError`, `SourceError`, `ConfigError` or `CheckpointError`.
    """
    model, data, given = config.model, config.data, dict(config.model.weights)
    family, _ = find_model(model.name)
    if unknown := given.keys() - family.components.keys():
        raise SettingError(f"model.weights: there is no component {min(unknown)}.")
    if not Path(model.folder).is_dir():
        raise SettingError(f"model.folder: there is no folder {model.folder}.")
    if not model.alone and "vae" not in given:
        raise SettingError("model.weights: a denoiser needs a finished vae: name its folder.")
    blueprint = open_model(
        model.name,
        model.folder,
        parts=given,
        dtype=jnp.float32,
        compute_dtype=model.compute_dtype,
        mesh=mesh,
        fast=False,
        attention=model.attention,
        attention_blocks=model.attention_blocks or None,  # pyright: ignore[reportArgumentType]
    )
    modules = {}
    for index, (name, component) in enumerate(blueprint.components.items()):
        if model.alone and name != "vae":
            continue
        if name in given:
            modules |= blueprint.load([name])
        else:
            key = jax.random.fold_in(jax.random.key(config.run.seed), index)
            modules[name] = eqx.filter_jit(component.init)(blueprint.configs[name], key=key)
    vae = None if model.alone else modules.pop("vae")
    settings = None
    if vae is not None:
        names = ("height", "width", "max_sequence_length")
        with blaming("data"):
            settings = blueprint.resolve({name: getattr(data, name) for name in names})
    with blaming("model.zero"):
        zero = select(modules, model.zero)
    modules = jax.tree.map(lambda x, wanted: jnp.zeros_like(x) if wanted else x, modules, zero)
    if mesh is not None:
        rules = {name: component.rules for name, component in blueprint.components.items()}
        modules = {name: spread(module, rules[name], mesh) for name, module in modules.items()}
    if model.remat:
        modules = {name: with_remat(module) for name, module in modules.items()}
    with blaming("model.train"):
        params, frozen = eqx.partition(modules, select(modules, model.train))
    return Studio(blueprint, frozen, vae, settings), params


@contextlib.contextmanager
def blaming(key: str) -> Iterator[None]:
    """Puts a key of the config before the message of an error. **Raises:** `SettingError`."""
    try:
        yield
    except (SettingError, ValueError) as error:
        raise SettingError(f"{key}: {error}") from None


def spread(module: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """Spreads the parameters of a module over a mesh."""

    def place(path: Any, leaf: Any) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        return reshard(leaf, parameter_sharding(dotted(path), leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(place, module)


def with_remat(module: Any) -> Any:
    """Returns the module with its blocks recomputed in the backward pass, where it can do that."""
    offers = any(field.name == "remat" for field in dataclasses.fields(module))
    return dataclasses.replace(module, remat=True) if offers else module


def measured(vae: AutoencoderKL, images: Float[np.ndarray, "n H W 3"]) -> AutoencoderKL:
    """Returns the autoencoder with the shift and scale that give the latents of these images mean 0
    and variance 1."""
    latents = np.asarray(encode_images(vae, images), np.float64)
    z = latents / vae.scaling_factor + vae.shift_factor
    shift, scale = float(z.mean()), float(1 / z.std())
    return dataclasses.replace(vae, shift_factor=round(shift, 6), scaling_factor=round(scale, 6))


def encode_images(
    vae: AutoencoderKL, images: Float[np.ndarray, "n H W 3"], batch: int = 64
) -> Float[np.ndarray, "n h w c"]:
    """Encodes images from -1 to 1 to the normalised means of their latents, `batch` at a time."""
    pad = -len(images) % batch
    padded = np.concatenate([images, np.repeat(images[-1:], pad, axis=0)])
    parts = [
        encode_batch(vae, jnp.asarray(padded[i : i + batch])) for i in range(0, len(padded), batch)
    ]
    return np.concatenate([to_host(part) for part in parts])[: len(images)]


@eqx.filter_jit
def encode_batch(vae: AutoencoderKL, images: Float[Array, "n H W 3"]) -> Float[Array, "n h w c"]:
    """Encodes images from -1 to 1 to the normalised means of their latents."""
    with float32_products(images.dtype):
        return jax.vmap(lambda image: vae.normalize(vae.encode(image).mean))(images)


@eqx.filter_jit
def reconstruct(vae: AutoencoderKL, images: Float[Array, "n H W 3"]) -> Float[Array, "n H W 3"]:
    """Encodes images from -1 to 1 and decodes the means of their latents to values from 0 to 1."""
    one = lambda image: vae.decode(vae.normalize(vae.encode(image).mean))
    with float32_products(images.dtype):
        return jnp.clip(jax.vmap(one)(images) / 2 + 0.5, 0, 1)


def write_model(
    studio: Studio, modules: Mapping[str, Any], config: TrainConfig, folder: Path
) -> None:
    """Writes the modules with their configs and tokenizers, in place of what the folder held.

    Of several processes all call this, and the first one writes.

    **Raises:** `CheckpointError` where the folder cannot be written; its old content stays.
    """
    blueprint, save_dtype = studio.blueprint, jnp.dtype(config.model.save_dtype)
    draft, old = (folder.with_name(f".{secrets.token_hex(4)}") for _ in range(2))
    cast = lambda x: x.astype(save_dtype) if eqx.is_inexact_array(x) else x
    if not is_first():
        for name, module in modules.items():
            table = read_table(blueprint.components[name].table)
            save_module(jax.tree.map(cast, module), table, draft / name)
        return
    try:
        template = shutil.ignore_patterns("*.safetensors*")
        shutil.copytree(config.model.folder, draft, ignore=template)
        for name, module in modules.items():
            component = blueprint.components[name]
            stem = "model" if component.stage == "text" else "diffusion_pytorch_model"
            table = read_table(component.table)
            save_module(jax.tree.map(cast, module), table, draft / name, stem=stem)
            part = blueprint.parts.get(name)
            path = f"{name}/config.json"
            fields = dict((part and part.config()) or blueprint.source.read_json(path))
            if isinstance(module, AutoencoderKL):
                fields["scaling_factor"] = module.scaling_factor
                fields["shift_factor"] = module.shift_factor
            (draft / path).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        where = error.filename or folder
        raise CheckpointError(f"{where} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
