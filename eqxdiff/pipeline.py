"""Prompt to picture: encode, sample, decode."""

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, DTypeLike, Float, Key, PyTree, UInt8
from PIL import Image as PILImage

from ._errors import ConfigError, EqxdiffError, SettingError
from .checkpoint import FILE, load_module
from .convert.recognise import claim_parts, locate, scheduler_fields
from .hub import Part, Source, open_part, open_weights
from .lora import Adapter, Fitted, apply_fitted, fit, load as load_adapter, merge_fitted
from .models import (
    AbstractFamily,
    Component,
    Control,
    Guidance,
    Modules,
    Settings,
    check_range,
    control_names,
    find_model,
)
from .sampling import AbstractParameterization, AbstractSolver, Schedule, start, step
from .sharding import BATCH_AXES, parameter_sharding, shard_batch
from .text import Tokenized, Tokenizer
from .vae import AutoencoderKL, decode_tiled


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """A model whose configs and tokenizers are read, and whose weights are not.

    **Fields:**

    - `model`: the name it goes by, such as `"flux-dev"`.
    - `configs`: of each component, of the `"scheduler"` and of the `"pipeline"`.
    - `dtype`: of the weights; `None` keeps the checkpoint's.
    - `compute_dtype`: of the activations.
    - `mesh`: the devices to spread over, or `None` for the default one.
    - `components`: those of the family and the ControlNets, by name.
    - `parts`: where the weights of those are that are not the source's own.
    - `defaults`: the settings that hold where nothing else is given.
    - `made_for`: the number of steps that the weights are made for, if there is one.
    - `note`: what a single file of weights lacks, and what that is taken from.
    - `adapters`: LoRAs, and whether they are `merged` rather than applied at run time.
    """

    model: str
    family: AbstractFamily
    source: Source
    configs: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]
    dtype: Any
    compute_dtype: Any
    mesh: Mesh | None
    components: Mapping[str, Component]
    parts: Mapping[str, Part]
    defaults: Settings
    made_for: int | None
    note: str | None = None
    adapters: Fitted | None = None
    merged: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these weights from others."""
        parts = {name: dict(part.identity) for name, part in self.parts.items()}
        return {**self.source.identity, **({"parts": parts} if parts else {})}

    @property
    def controlnets(self) -> int:
        """How many ControlNets there are."""
        return len(self.components) - len(self.family.components)

    def names(self, stage: str) -> list[str]:
        """The components of a stage: `"text"`, `"denoiser"` or `"vae"`."""
        return [name for name, part in self.components.items() if part.stage == stage]

    def resolve(self, given: Mapping[str, Any]) -> Settings:
        """The settings as applied. **Raises:** `SettingError`."""
        settings = self.family.resolve(given, self.model, self.defaults, self.configs)
        if self.made_for not in (None, settings.steps):
            raise SettingError(
                f"These weights of {self.model} are made for {self.made_for} steps: load the model "
                f"with steps={settings.steps} for others."
            )
        return settings

    def tokenize(
        self, prompt: str, prompt_2: str | None, settings: Settings
    ) -> dict[str, Tokenized]:
        """The tokens of a prompt for each text encoder. **Raises:** `PromptError`."""
        second = prompt if prompt_2 is None else prompt_2
        return self.family.tokenize(self.tokenizers, prompt, second, settings)

    def load(self, names: Sequence[str], *, progress: Progress | None = None) -> dict[str, Any]:
        """The named components with their weights. **Raises:** `CheckpointError`, `SourceError`."""
        return {name: self._load_component(name, progress) for name in names}

    def _load_component(self, name: str, progress: Progress | None) -> Any:
        component = self.components[name]
        report = None if progress is None else partial(progress, f"loading {name}")
        part = self.parts.get(name)
        tensors = self.source.tensors(name) if part is None else part.tensors()
        skeleton = component.skeleton(self.configs[name])
        tensors, table = locate(tensors, component.table, skeleton)
        dtype = FILE if self.dtype is None else self.dtype

        def sharding(path: str, shape: tuple[int, ...]) -> Sharding | None:
            if self.mesh is None:
                return None
            return parameter_sharding(path, shape, component.rules, self.mesh)

        module = load_module(
            tensors,
            table,
            skeleton,
            dtype=dtype,
            sharding=sharding,
            name=name,
            progress=report,
        )
        if self.adapters is None:
            return module
        put = merge_fitted if self.merged else apply_fitted
        return put({name: module}, self.adapters)[name]


def open_model(
    name: str,
    weights: str | None = None,
    *,
    parts: Mapping[str, str] = types.MappingProxyType({}),
    controlnets: Sequence[str] = (),
    steps: int | None = None,
    loras: Sequence[str | Adapter] = (),
    lora_partial: bool = False,
    lora_mode: Literal["merge", "runtime"] = "merge",
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Blueprint:
    """Reads all of a model but its weights: cheap, and finds most mistakes.

    **Arguments:** as of `load`.

    **Raises:** `SettingError` for an unknown name, `SourceError` where the weights are not to be
    had, `ConfigError` where they are of another architecture.
    """
    family, preset = find_model(name)
    made_for = None
    if preset.distilled and weights is None and not set(preset.parts) & set(parts):
        made_for = steps or preset.defaults.steps
        if made_for not in preset.distilled:
            choices = ", ".join(map(str, preset.distilled))
            raise SettingError(f"{name} is made for {choices} steps, not for {made_for}.")
    preset = preset.distilled.get(steps or preset.defaults.steps, preset)
    given = open_weights(weights, preset.home, revision=revision)
    source = given.source
    specs = {**(preset.parts if weights is None else {}), **parts}
    if unknown := [part for part in specs if part not in family.components]:
        choices = ", ".join(family.components)
        raise SettingError(f"{name} has no component {unknown[0]}: it has {choices}.")
    opened = {part: open_part(spec) for part, spec in specs.items()}
    configs = {
        "pipeline": family.parse_index(source.read_json("model_index.json")),
        "scheduler": family.parse_scheduler(scheduler_fields(given, family.files)),
    }
    for part, component in family.components.items():
        fields = opened[part].config() if part in opened else None
        configs[part] = component.parse(fields or source.read_json(f"{part}/config.json"))
    family.check(configs)
    opened = {**claim_parts(given, family.components, configs), **opened}
    note = given.note(family.components, opened)
    components = dict(family.components)
    if controlnets and family.controlnet is None:
        raise SettingError(f"There are no ControlNets for {name}.")
    for part, spec in zip(control_names(len(controlnets)), controlnets, strict=True):
        assert family.controlnet is not None
        components[part] = family.controlnet
        if spec not in preset.controls and "/" not in spec and not Path(spec).exists():
            known = ", ".join(preset.controls) or "none"
            raise SettingError(
                f"{name} knows no ControlNet {spec!r}: it knows {known}; or give a Hub repository "
                "as OWNER/NAME, or a folder."
            )
        opened[part] = open_part(preset.controls.get(spec, spec))
        configs[part] = family.control_config(configs, opened[part].config())
    tokenizers = {part: Tokenizer.load(source.folder(part)) for part in family.tokenizers}
    for part, encoder in family.tokenizers.items():
        size, known = tokenizers[part].vocab_size, configs[encoder].vocab_size
        if size > known:  # an index out of range would be clamped in silence
            raise ConfigError(
                f"{part} has {size} tokens and {encoder} embeds {known}: "
                "they do not belong together."
            )
    adapters = None
    if loras:
        skeletons = {
            part: component.skeleton(configs[part])
            for part, component in family.components.items()
            if component.stage != "vae"
        }
        opened_loras = [load_adapter(one) if isinstance(one, str) else one for one in loras]
        adapters = fit(skeletons, opened_loras, partial=lora_partial, widen=False)
    if compute_dtype is None:
        compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return Blueprint(
        name,
        family,
        source,
        configs,
        tokenizers,
        None if dtype is None else jnp.dtype(dtype),
        jnp.dtype(compute_dtype),
        mesh,
        components,
        opened,
        preset.defaults,
        made_for,
        note,
        adapters,
        lora_mode == "merge",
    )


class Encoded(eqx.Module):
    """Prompts as the denoiser sees them.

    **Fields:**

    - `conditional`: what the family's text encoders say, one row for each prompt.
    - `unconditional`: the same of the negative prompt, with classifier-free guidance.
    - `dropped`: for each prompt, what was cut off its end.
    """

    conditional: PyTree
    unconditional: PyTree | None
    prompts: tuple[str, ...] = eqx.field(static=True)
    dropped: tuple[str, ...] = eqx.field(static=True)


class Pipeline(eqx.Module):
    """A loaded model: a PyTree of its components. Edit one with `eqx.tree_at`.

    **Fields:**

    - `components`: the modules by name, such as `pipe.components["transformer"]`. Those that a
        call does not need may be absent.
    - `blueprint`: the rest: configs, tokenizers, dtypes, where the weights came from.
    """

    components: dict[str, Any]
    blueprint: Blueprint = eqx.field(static=True)

    def __getitem__(self, name: str) -> Any:
        """A component. **Raises:** `SettingError` where it is not loaded."""
        if name not in self.components:
            raise SettingError(f"This needs the component {name}, which is not loaded.")
        return self.components[name]

    def stage(self, stage: str) -> dict[str, Any]:
        """The loaded components of a stage. **Raises:** `SettingError` where one is missing."""
        return {name: self[name] for name in self.blueprint.names(stage)}

    def without(self, stage: str) -> "Pipeline":
        """The pipeline without the components of a stage, whose memory is freed with them."""
        gone = self.blueprint.names(stage)
        kept = {name: part for name, part in self.components.items() if name not in gone}
        return Pipeline(kept, self.blueprint)

    def adding(self, components: Mapping[str, Any]) -> "Pipeline":
        """The pipeline with more components, or with others in place of its own."""
        return Pipeline({**self.components, **components}, self.blueprint)

    def encode(self, prompts: str | Sequence[str], **given: Any) -> Encoded:
        """Runs the text encoders, and nothing else, so that they can be dropped afterwards.

        **Arguments:**

        - `given`: fields of `Settings`. What matters here are the second and negative prompts, the
            guidance, `clip_skip` and `max_sequence_length`; the rest may be given too.

        **Raises:** `SettingError` where an encoder is not loaded; `PromptError`.
        """
        plan = self.blueprint
        settings = plan.resolve(given)
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        modules = self.stage("text")

        def encode(prompt: str, prompt_2: str | None) -> tuple[PyTree, str]:
            texts = plan.tokenize(prompt, prompt_2, settings)
            tokens = {name: jnp.asarray(text.ids) for name, text in texts.items()}
            dropped = dict.fromkeys(text.dropped for text in texts.values() if text.dropped)
            skip = settings.clip_skip or 0
            encoded = _encode(plan.family, modules, tokens, skip, plan.compute_dtype)
            return encoded, max(dropped, key=len, default="")

        rows = [encode(prompt, settings.prompt_2) for prompt in prompts]
        unconditional = None
        if plan.family.guidance(plan.configs, settings).classifier_free is not None:
            texts = settings.negative_prompt, settings.negative_prompt_2
            unconditional, _ = encode(texts[0] or "", texts[1])
            if texts == (None, None):
                unconditional = plan.family.absent(plan.configs, unconditional)
        conditional = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(row for row, _ in rows))
        return Encoded(conditional, unconditional, prompts, tuple(cut for _, cut in rows))


def load(
    name: str,
    weights: str | None = None,
    *,
    parts: Mapping[str, str] = types.MappingProxyType({}),
    controlnets: Sequence[str] = (),
    steps: int | None = None,
    loras: Sequence[str | Adapter] = (),
    lora_partial: bool = False,
    lora_mode: Literal["merge", "runtime"] = "merge",
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """Loads a model.

    **Arguments:**

    - `name`: such as `"flux-dev"`.
    - `weights`: a folder in the diffusers layout, a Hub repository, or a single file in any layout
        (`FILE.safetensors` or `REPOSITORY:FILE`), by default the model's own. What a file lacks
        comes from the model's own repository.
    - `parts`: component -> a `.safetensors` file, a folder, a repository or `REPOSITORY:FILE`, in
        place of the model's own, such as `{"unet": "ByteDance/SDXL-Lightning:..."}`.
    - `controlnets`: names that the model knows, such as `"canny"`, or folders or repositories.
    - `steps`: for a model whose weights depend on the number of steps, such as SDXL-Lightning.
    - `loras`: adapters, or what `eqxdiff.lora.load` reads, such as `"style.safetensors@0.8"`.
    - `lora_partial`: accept tensors of theirs that fit nothing in the model.
    - `lora_mode`: add them to the weights, or apply them beside the weights at run time.
    - `dtype`: of the weights, by default the checkpoint's.
    - `compute_dtype`: of the activations, by default float32 on a CPU and else bfloat16.
    - `mesh`: from `eqxdiff.make_mesh`, to spread weights and batches over devices.
    - `revision`: branch, tag or commit of the repository.

    **Raises:** `SettingError`, `SourceError`, `ConfigError` or `CheckpointError`.
    """
    plan = open_model(
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
        mesh=mesh,
    )
    return Pipeline(plan.load(list(plan.components), progress=progress), plan)


@dataclasses.dataclass(frozen=True, eq=False)
class ControlImage:
    """A picture of what to draw where, for one ControlNet.

    **Fields:**

    - `image`: of the size of the picture to be made: a PIL image, or `(height, width, 3)` as uint8
        or from 0 to 1.
    - `scale`: how much it counts; 0 is off.
    - `start`, `end`: the parts of all steps that are done when it begins and ceases to act.
    - `guess`: whether it acts on the conditional prediction alone and the less the finer the layer,
        for pictures without a prompt.
    """

    image: PILImage.Image | np.ndarray
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def resolve(self, settings: Settings, schedule: Schedule) -> Control:
        """What the denoiser sees. **Raises:** `SettingError`."""
        image = self.image.convert("RGB") if isinstance(self.image, PILImage.Image) else self.image
        pixels = np.asarray(image)
        if pixels.dtype == np.uint8:
            pixels = pixels.astype(np.float32) / 255
        wanted = settings.height, settings.width, 3
        if pixels.shape != wanted:
            size = "x".join(map(str, pixels.shape[1::-1]))
            raise SettingError(
                f"A control image is {size} and the picture {settings.width}x{settings.height}: "
                "resize it, or give its size as --width and --height."
            )
        if not (np.isfinite(pixels).all() and 0 <= pixels.min() and pixels.max() <= 1):
            raise SettingError("The pixels of a control image are not from 0 to 1.")
        check_range("control_scale", self.scale, 0)
        steps = schedule.steps
        acts = [i for i in range(steps) if i / steps >= self.start and (i + 1) / steps <= self.end]
        if not acts:
            raise SettingError(
                f"A control image that acts from {self.start:g} to {self.end:g} of the way acts on "
                f"none of {steps} steps."
            )
        times = np.asarray(schedule.timestep)
        first = np.inf if acts[0] == 0 else times[acts[0]]
        last = -1.0 if acts[-1] == steps - 1 else times[acts[-1] + 1]
        scalar = lambda value: jnp.asarray(value, jnp.float32)
        return Control(
            jnp.asarray(pixels, jnp.float32),
            scalar(self.scale),
            scalar(first),
            scalar(last),
            self.guess,
        )


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image and how it came about.

    **Fields:**

    - `array`: float32, `(height, width, 3)`, in [0, 1]; `None` where nothing was decoded.
    - `latent`: float32, `(channels, height, width)`, unit variance, unpacked.
    - `seed`: that of this image alone.
    - `settings`: as applied.
    """

    array: np.ndarray | None
    latent: np.ndarray
    prompt: str
    seed: int
    settings: Settings

    @property
    def image(self) -> PILImage.Image:
        """The image in 8 bits."""
        if self.array is None:
            raise SettingError("This picture was not decoded.")
        return PILImage.fromarray(to_bytes(self.array))


@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` returns: for each prompt in turn, its images.

    **Fields:**

    - `images`: PIL images.
    - `arrays`: float32, `(n, height, width, 3)`, in [0, 1].
    - `latents`: float32, `(n, channels, height / 8, width / 8)`: the final latents.
    - `seeds`: of each image.
    """

    images: list[PILImage.Image]
    arrays: np.ndarray
    latents: np.ndarray
    seeds: list[int]


def generate(
    pipe: Pipeline,
    prompts: str | Sequence[str] | Encoded,
    *,
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 1,
    noise: Float[np.ndarray, "n c h w"] | None = None,
    controls: Sequence[ControlImage] = (),
    progress: Progress | None = None,
    **given: Any,
) -> Result:
    """Makes `num_images` images of each prompt.

    Image `k` of a prompt starts from the noise of `jax.random.key(seed + k)`: the same alone, in
    any batch and on any mesh.

    **Arguments:**

    - `prompts`: texts, or what `pipe.encode` made of them.
    - `batch_size`: images in one compiled call. The last batch is padded, not recompiled.
    - `noise`: the initial noise of all images, `(n, channels, height / 8, width / 8)`, of unit
        variance, in place of that of the seeds.
    - `controls`: an image for each ControlNet that the pipeline was loaded with, or none.
    - `progress`: called as `progress(what, done, total)`.
    - `given`: fields of `Settings`: `steps`, `guidance`, `cfg`, `negative_prompt`, `height`,
        `width`, `sampler` and so on, by default the model's.

    **Raises:** `SettingError` where a setting is out of range or would be ignored.
    """
    settings = pipe.blueprint.resolve(given)
    encoded = prompts if isinstance(prompts, Encoded) else pipe.encode(prompts, **given)
    pictures = list(
        generate_each(
            pipe,
            encoded,
            settings,
            seed=seed,
            num_images=num_images,
            batch_size=batch_size,
            noise=noise,
            controls=controls,
            progress=progress,
        )
    )
    arrays = [picture.array for picture in pictures if picture.array is not None]
    return Result(
        [picture.image for picture in pictures],
        np.stack(arrays),
        np.stack([picture.latent for picture in pictures]),
        [picture.seed for picture in pictures],
    )


def generate_each(
    pipe: Pipeline,
    encoded: Encoded,
    settings: Settings,
    *,
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 1,
    noise: Float[np.ndarray, "n c h w"] | None = None,
    controls: Sequence[ControlImage] = (),
    decode: bool = True,
    progress: Progress | None = None,
) -> Iterator[Picture]:
    """As `generate`, one picture after the other as each batch is done.

    **Arguments:** as of `generate`, and

    - `settings`: from `pipe.blueprint.resolve`.
    - `decode`: `False` for latents alone; then the VAE need not be loaded.
    """
    plan = pipe.blueprint
    family, configs = plan.family, plan.configs
    check_range("num_images", num_images, 1)
    check_range("batch_size", batch_size, 1)
    check_range("seed", seed, 0, 2**32 - num_images)
    if plan.mesh is not None:
        check_divides(plan.mesh, batch_size)
    h, w, c = family.latent_shape(configs, settings)
    jobs = [(row, seed + k) for row in range(len(encoded.prompts)) for k in range(num_images)]
    if noise is not None:
        check_noise(noise, (len(jobs), c, h, w))
    guidance = family.guidance(configs, settings)
    if (guidance.classifier_free is None) != (encoded.unconditional is None):
        raise SettingError("Encode the prompts with the guidance settings that they are used with.")
    if len(controls) not in (0, plan.controlnets):
        raise SettingError(
            f"The model is loaded with {plan.controlnets} ControlNets, and there are "
            f"{len(controls)} control images."
        )
    schedule = family.schedule(configs, settings)
    unconditional = encoded.unconditional
    if unconditional is not None:
        unconditional = family.condition(settings, unconditional, negative=True)
    sampler = Sampler(
        pipe.stage("denoiser"),
        unconditional,
        guidance,
        tuple(control.resolve(settings, schedule) for control in controls),
        schedule,
        family.solver(configs, settings),
        family.parameterization(configs, settings),
        family,
        plan.compute_dtype,
        plan.mesh,
    )
    conditional = jax.vmap(partial(family.condition, settings, negative=False))(encoded.conditional)
    vae = pipe["vae"] if decode else None
    total = -(-len(jobs) // batch_size) * settings.steps

    for first in range(0, len(jobs), batch_size):
        index = [min(first + i, len(jobs) - 1) for i in range(batch_size)]
        rows = np.array([jobs[i][0] for i in index])
        seeds = [jobs[i][1] for i in index]
        unit = initial_noise(seeds, (c, h, w)) if noise is None else jnp.asarray(noise[index])
        done = first // batch_size * settings.steps
        latents = sampler(unit, gather(conditional, rows), seeds, progress, done, total)
        arrays: list[np.ndarray | None] = [None] * batch_size
        if vae is not None:
            dtype = family.decode_dtype(configs, plan.compute_dtype)
            tiling = bool(settings.vae_tiling)
            arrays = list(np.asarray(_decode(vae, latents, dtype, tiling, plan.mesh)))
        final = np.asarray(latents.transpose(0, 3, 1, 2), np.float32)
        for i in range(min(batch_size, len(jobs) - first)):
            check_finite(arrays[i], final[i], encoded.prompts[rows[i]])
            prompt = encoded.prompts[rows[i]]
            yield Picture(arrays[i], final[i], prompt, seeds[i], settings)


class Sampler(eqx.Module):
    """What stays the same from batch to batch, and the loop over the steps.

    Each step is one call of one compiled function with a traced index, so that progress needs no
    host callback.
    """

    modules: Modules
    unconditional: PyTree | None
    guidance: Guidance
    controls: tuple[Control, ...]
    schedule: Schedule
    solver: AbstractSolver
    parameterization: AbstractParameterization
    family: AbstractFamily
    dtype: Any = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    def __call__(
        self,
        noise: Float[Array, "n c h w"],
        conditional: PyTree,
        seeds: Sequence[int],
        progress: Progress | None,
        done: int,
        total: int,
    ) -> Float[Array, "n h w c"]:
        keys = _keys(seeds)
        x = noise.astype(jnp.float32).transpose(0, 2, 3, 1)
        x, keys, conditional = shard_batch((x, keys, conditional), self.mesh)
        x, state = _start(self, x)
        for index in range(self.schedule.steps):
            if progress is not None:
                progress("sampling", done + index, total)
            x, state = _step((self, conditional, keys, jnp.asarray(index)), x, state)
            if progress is not None:
                x.block_until_ready()
        if progress is not None:
            progress("sampling", done + self.schedule.steps, total)
        return x


@eqx.filter_jit
def _encode(
    family: AbstractFamily, modules: Modules, tokens: PyTree, clip_skip: int, dtype: Any
) -> PyTree:
    return family.encode(modules, tokens, clip_skip, dtype)


@eqx.filter_jit
def _start(sampler: Sampler, x: Float[Array, "n h w c"]) -> tuple[Array, PyTree]:
    def one(x):
        x = start(x, sampler.schedule)
        return x, sampler.solver.init(x, sampler.schedule)

    return jax.vmap(one)(x)


@eqx.filter_jit(donate="all-except-first")
def _step(fixed: PyTree, x: Float[Array, "n h w c"], state: PyTree) -> tuple[Array, PyTree]:
    sampler, conditional, keys, index = fixed

    def one(x, state, conditional, key):
        denoiser = sampler.family.denoiser(
            sampler.modules,
            conditional,
            sampler.unconditional,
            sampler.guidance,
            sampler.controls,
            sampler.parameterization,
            sampler.dtype,
        )
        return step(denoiser, x, state, sampler.schedule, index, sampler.solver, key)

    return _batched(one, sampler.mesh)(x, state, conditional, keys)


@eqx.filter_jit
def _decode(
    vae: AutoencoderKL,
    latents: Float[Array, "n h w c"],
    dtype: Any,
    tiling: bool,
    mesh: Mesh | None,
) -> Float[Array, "n H W 3"]:
    def one(latent):
        decode = decode_tiled if tiling else AutoencoderKL.decode
        image = decode(vae, latent.astype(dtype)).astype(jnp.float32)
        return jnp.clip(image / 2 + 0.5, 0, 1)

    return _batched(one, mesh)(latents)


def _batched(function: Callable[..., PyTree], mesh: Mesh | None) -> Callable[..., PyTree]:
    """Over a batch that is split over the mesh; without the names XLA would gather it."""
    return jax.vmap(function, spmd_axis_name=None if mesh is None else BATCH_AXES)


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Float[Array, "n c h w"]:
    """Unit noise in float32: that of a seed depends on no other seed and on no device."""
    keys = _keys(seeds)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _keys(seeds: Sequence[int]) -> Key[Array, " n"]:
    """A key of each seed, of the same generator however JAX is configured."""
    return jnp.stack([jax.random.key(seed, impl="threefry2x32") for seed in seeds])


def gather(conditioning: PyTree, rows: np.ndarray) -> PyTree:
    """The conditioning of a batch: one row of each array for each image."""
    return jax.tree.map(lambda leaf: leaf[rows], conditioning)


def to_bytes(array: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Values in [0, 1] to 8 bits, rounded to nearest."""
    return np.round(array * 255).astype(np.uint8)


def check_divides(mesh: Mesh, batch_size: int) -> None:
    """**Raises:** `SettingError` where a batch cannot be split over the mesh."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % ways:
        raise SettingError(
            f"--batch-size {batch_size} cannot be split over {ways} devices: use a multiple."
        )


def check_noise(noise: np.ndarray, shape: tuple[int, ...]) -> None:
    """**Raises:** `SettingError` where injected noise is misshapen or not finite."""
    if noise.shape != shape:
        raise SettingError(f"The noise has the shape {noise.shape}; these images need {shape}.")
    if not np.issubdtype(noise.dtype, np.floating) or not np.isfinite(noise).all():
        raise SettingError("The noise is not made of finite floating point numbers.")


def check_finite(array: np.ndarray | None, latent: np.ndarray, prompt: str) -> None:
    """**Raises:** `EqxdiffError` rather than pass on a black picture."""
    for name, value in (("latent", latent), ("decoded image", array)):
        if value is not None and not np.isfinite(value).all():
            raise EqxdiffError(
                f"The {name} of the prompt {prompt[:40]!r} has values that are not finite. "
                "Try --compute-dtype float32."
            )
