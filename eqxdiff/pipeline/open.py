"""From a model's name to its blueprint, and to the loaded pipeline."""

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from .._errors import ConfigError, SettingError
from ..checkpoint import leaf_paths
from ..convert.recognise import claim_parts, scheduler_fields
from ..hub import Part, Source, open_part, open_weights
from ..kernels import Attention, Blocks, choose_attention
from ..lora import Adapter, Fitted, fit
from ..models import Component, Family, Preset, control_names, find_model
from ..sharding import check_weights
from ..text import Tokenizer
from .blueprint import Blueprint, Progress
from .pipeline import Pipeline


LoraMode = Literal["merge", "runtime"]


def open_model(
    name: str,
    weights: str | None = None,
    *,
    parts: Mapping[str, str] = types.MappingProxyType({}),
    controlnets: Sequence[str] = (),
    steps: int | None = None,
    loras: Sequence[str | Adapter] = (),
    lora_partial: bool = False,
    lora_mode: LoraMode = "merge",
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    attention: Attention = "auto",
    attention_blocks: Blocks | None = None,
    mesh: Mesh | None = None,
    fast: bool = True,
) -> Blueprint:
    """Reads all of a model but its weights: that is cheap, and finds most mistakes.

    **Arguments:** as of `load`.

    **Raises:** `SettingError` for an unknown name, `SourceError` where the weights cannot be had,
    `ConfigError` where they are of another architecture.
    """
    family, preset = find_model(name)
    made_for, preset = _distilled(name, preset, steps, own=weights is None, parts=parts)
    if compute_dtype is None:
        compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    choice = choose_attention(attention, attention_blocks, mesh=mesh, dtype=compute_dtype)
    given = open_weights(weights, preset.home, revision=revision)
    source = given.source
    opened = _open_parts(name, family, {**(preset.parts if weights is None else {}), **parts})
    configs: dict[str, Any] = {
        "pipeline": family.parse_index(source.read_json("model_index.json")),
        "scheduler": family.parse_scheduler(scheduler_fields(given, family.files)),
    }
    for part, component in family.components.items():
        fields = opened[part].config() if part in opened else None
        configs[part] = component.parse(fields or source.read_json(f"{part}/config.json"))
    model = family.bind(name, preset.defaults, configs)
    opened = {**claim_parts(given, family.components, configs), **opened}
    note = given.note(family.components, opened)
    components = dict(family.components)
    for net, part, spec in _controlnets(name, family, preset, controlnets):
        components[net], opened[net] = spec, part
        configs[net] = family.control_config(configs, part.config())
    if mesh is not None:
        _check_mesh(components, configs, mesh)
    return Blueprint(
        model,
        family,
        source,
        configs,
        _tokenizers(family, source, configs),
        None if dtype is None else jnp.dtype(dtype),
        jnp.dtype(compute_dtype),
        mesh,
        choice,
        components,
        opened,
        made_for,
        note,
        fast,
        _fit(family, configs, loras, partial=lora_partial),
        lora_mode == "merge",
    )


def _check_mesh(
    components: Mapping[str, Component], configs: Mapping[str, Any], mesh: Mesh
) -> None:
    for name, component in components.items():
        if component.stage == "denoiser":
            leaves = leaf_paths(component.skeleton(configs[name]))
            shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
            check_weights(name, shapes, component.rules, mesh)


def _distilled(
    name: str, preset: Preset, steps: int | None, *, own: bool, parts: Mapping[str, str]
) -> tuple[int | None, Preset]:
    """Returns the number of steps that the weights are made for, and the preset for it."""
    made_for = None
    if preset.distilled and own and not set(preset.parts) & set(parts):
        made_for = steps or preset.defaults.steps
        if made_for not in preset.distilled:
            choices = ", ".join(map(str, preset.distilled))
            raise SettingError(f"{name} is made for {choices} steps, not for {made_for}.")
    return made_for, preset.distilled.get(steps or preset.defaults.steps, preset)


def _open_parts(name: str, family: Family, specs: Mapping[str, str]) -> dict[str, Part]:
    if unknown := [part for part in specs if part not in family.components]:
        choices = ", ".join(family.components)
        raise SettingError(f"{name} has no component {unknown[0]}: it has {choices}.")
    return {part: open_part(spec) for part, spec in specs.items()}


def _controlnets(
    name: str, family: Family, preset: Preset, specs: Sequence[str]
) -> list[tuple[str, Part, Component]]:
    """Opens the ControlNets that a user named, for the names of their components."""
    if not specs:
        return []
    if family.controlnet is None:
        raise SettingError(f"There are no ControlNets for {name}.")
    found = []
    for net, spec in zip(control_names(len(specs)), specs, strict=True):
        if spec not in preset.controls and "/" not in spec and not Path(spec).exists():
            known = ", ".join(preset.controls) or "none"
            raise SettingError(
                f"{name} knows no ControlNet {spec!r}: it knows {known}; or give a Hub repository "
                "as OWNER/NAME, or a folder."
            )
        found.append((net, open_part(preset.controls.get(spec, spec)), family.controlnet))
    return found


def _tokenizers(family: Family, source: Source, configs: Mapping[str, Any]) -> dict[str, Tokenizer]:
    tokenizers = {part: Tokenizer.load(source.folder(part)) for part in family.tokenizers}
    for part, encoder in family.tokenizers.items():
        size, known = tokenizers[part].vocab_size, configs[encoder].vocab_size
        if size > known:  # an index out of range would be clamped in silence
            raise ConfigError(
                f"{part} has {size} tokens and {encoder} embeds {known}: "
                "they do not belong together."
            )
    return tokenizers


def _fit(
    family: Family, configs: Mapping[str, Any], loras: Sequence[str | Adapter], *, partial: bool
) -> Fitted | None:
    if not loras:
        return None
    skeletons = {
        part: component.skeleton(configs[part])
        for part, component in family.components.items()
        if component.stage != "vae"
    }
    return fit(skeletons, loras, partial=partial, widen=False)


def load(
    name: str,
    weights: str | None = None,
    *,
    parts: Mapping[str, str] = types.MappingProxyType({}),
    controlnets: Sequence[str] = (),
    steps: int | None = None,
    loras: Sequence[str | Adapter] = (),
    lora_partial: bool = False,
    lora_mode: LoraMode = "merge",
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    attention: Attention = "auto",
    attention_blocks: Blocks | None = None,
    mesh: Mesh | None = None,
    fast: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """Loads a model.

    **Arguments:**

    - `name`: such as `"flux-dev"`.
    - `weights`: a folder in the diffusers layout, a Hub repository, or a single file in any layout
        (`FILE.safetensors` or `REPOSITORY:FILE`), by default the model's own. The model's own
        repository completes a single file.
    - `parts`: component -> a `.safetensors` file, a folder, a repository or `REPOSITORY:FILE`, in
        place of the model's own, such as `{"unet": "ByteDance/SDXL-Lightning:..."}`.
    - `controlnets`: names that the model knows, such as `"canny"`, or folders or repositories.
    - `steps`: for a model whose weights depend on the number of steps, such as SDXL-Lightning.
    - `loras`: adapters, or what `eqxdiff.lora.load` reads, such as `"style.safetensors@0.8"`.
    - `lora_partial`: accept tensors of a LoRA that fit nothing in the model.
    - `lora_mode`: add LoRAs to the weights, or apply them beside the weights at run time.
    - `dtype`: of the weights; by default each tensor keeps the checkpoint's.
    - `compute_dtype`: of the activations; by default float32 on a CPU, else bfloat16.
    - `attention`: the backend of attention: `"auto"`, the best that can do a shape; `"xla"`, the
        definition; `"chunked"`, plain JAX by blocks; `"pallas_tpu"`, `"cudnn"` or `"pallas_gpu"`.
        A shape that the backend refuses goes to the next best. Of MaxDiffusion's names
        `"dot_product"` is `"xla"`, `"cudnn_flash_te"` is `"cudnn"`, and `"flash"` the platform's
        kernel.
    - `attention_blocks`: how many queries and how many keys a backend works on at a time.
    - `mesh`: made by `eqxdiff.make_mesh`, to spread weights and batches over devices.
    - `fast`: keep the weights in the order that computes fastest; the results are the same to
        rounding. `False` keeps the checkpoint's order, for code that reads or edits weights. LoRAs
        and saving see the checkpoint's order in either case.
    - `revision`: branch, tag or commit of the repository.
    - `progress`: called as `progress(what, done, total)`.

    **Raises:** `SettingError`, `SourceError`, `ConfigError` or `CheckpointError`.
    """
    blueprint = open_model(
        name,
        weights,
        parts=parts,
        controlnets=controlnets,
        steps=steps,
        loras=loras,
        lora_partial=lora_partial,
        lora_mode=lora_mode,
        revision=revision,
        dtype=dtype,
        compute_dtype=compute_dtype,
        attention=attention,
        attention_blocks=attention_blocks,
        mesh=mesh,
        fast=fast,
    )
    return Pipeline(blueprint.load(list(blueprint.components), progress=progress), blueprint)
