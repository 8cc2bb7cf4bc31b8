"""A model as shapes: its components and the programs of a picture, with no weights."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._errors import SettingError
from ..models import find_model, tiles
from ..pipeline import Blueprint, Job, Programs, Request, open_model, stack_examples
from ..pipeline.inputs import make_inputs
from ..pipeline.sample import Loop


@dataclasses.dataclass(frozen=True, eq=False)
class Skeletons:
    """A model without weights.

    **Fields:**

    - `blueprint`: its configs; where no files are at hand, its source is empty.
    - `modules`: the shapes and dtypes of each component, as they would be loaded.
    - `request`: a picture like those to be made, whose settings are replaced.
    """

    blueprint: Blueprint
    modules: Mapping[str, Any]
    request: Request = dataclasses.field(default_factory=lambda: Request("a picture"))

    @classmethod
    def of(cls, blueprint: Blueprint, request: Request | None = None) -> "Skeletons":
        """Reads the headers of the files. **Raises:** `SourceError`, `CheckpointError`."""
        modules = {name: blueprint.shapes(name) for name in blueprint.components}
        return cls(blueprint, modules, request or Request("a picture"))

    @classmethod
    def published(cls, name: str, *, dtype: Any = None, compute_dtype: Any = None) -> "Skeletons":
        """Makes those of a model from the sizes that the package states. It reads no other file.

        **Raises:** `SettingError` where the package does not state them.
        """
        family, preset = find_model(name)
        if preset.embedded:
            blueprint = open_model(name, dtype=dtype, compute_dtype=compute_dtype)
            return cls.of(blueprint)
        sizes = family.published(name)
        if sizes is None:
            raise SettingError(f"The sizes of {name} are not known: give its files as `weights`.")
        with tempfile.TemporaryDirectory() as folder:
            for path, text in sizes.files.items():
                file = Path(folder) / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            blueprint = open_model(name, folder, dtype=dtype, compute_dtype=compute_dtype)
        modules = {
            part: component.skeleton(
                blueprint.configs[part], jnp.dtype(dtype or sizes.dtypes[part])
            )
            for part, component in blueprint.components.items()
        }
        return cls(blueprint, modules)

    def stage(self, stage: str) -> dict[str, Any]:
        """Returns the components of a stage."""
        return {name: self.modules[name] for name in self.blueprint.names(stage)}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program of a picture as a function of flat arrays.

    **Fields:**

    - `name`: `"encode"`, `"begin"`, `"step"` or `"decode"`.
    - `stage`: the stage whose weights it takes: `"text"`, `"denoiser"` or `"vae"`.
    - `weights`: the modules, as shapes.
    - `inputs`: the other arguments, as shapes.
    - `function`: of the weights and the inputs.
    - `outputs`: the shapes of the result.
    - `calls`: how often it runs for a batch of pictures.
    - `donated`: whether the inputs that change from call to call are given away.
    - `attention`: the backend of each shape of attention.
    """

    name: str
    stage: str
    weights: Any
    inputs: tuple[Any, ...]
    function: Callable[..., PyTree]
    outputs: PyTree
    calls: int
    donated: bool = False
    attention: Mapping[str, str] = dataclasses.field(default_factory=dict)


def make_programs(
    skeletons: Skeletons, job: Job, batch_size: int = 1, *, ahead: bool = True
) -> tuple[list[Program], PyTree]:
    """Returns the programs that make a batch of pictures like that of a job, and the structure of
    what the text encoders say.

    Nothing is computed: all arrays are shapes.

    **Arguments:**

    - `ahead`: whether the step is that of the sampler, which gets what `begin` computed ahead.
    """
    blueprint, own = skeletons.blueprint, Programs()
    text, denoiser, vae = (skeletons.stage(stage) for stage in ("text", "denoiser", "vae"))
    tokens = {role: as_shapes(each.tokens) for role, each in job.texts.items()}

    used: dict[str, dict[str, str]] = {}

    def encode(modules: Any, tokens: PyTree) -> PyTree:
        encoded, used["encode"] = own.encode(blueprint, modules, tokens)
        return encoded

    encoded = {role: jax.eval_shape(encode, text, each) for role, each in tokens.items()}

    def example(encoded: PyTree, vae: Any) -> PyTree:
        inputs = make_inputs(
            blueprint,
            vae,
            job.request,
            job.settings,
            job.recipe,
            job.pixels,
            job.references,
            jax.random.key(0),
        )
        return stack_examples([job.example(blueprint, encoded, inputs)], batch_size)

    batch = jax.eval_shape(example, encoded, vae)
    loop = Loop(denoiser, batch, (), blueprint)

    def begin(modules: Any, batch: PyTree) -> PyTree:
        return own.begin(Loop(modules, batch, (), blueprint))

    def step(modules: Any, batch: PyTree, index: Any, x: Any, state: PyTree) -> PyTree:
        *made, used["step"] = own.advance(
            (Loop(modules, batch, (), blueprint, later.ahead), index), x, state
        )
        return tuple(made)

    def decode(modules: Any, latents: Any) -> PyTree:
        image, used["decode"] = own.decode(blueprint, modules, latents, tiles(job.settings))
        return image

    x, state, conditions = begun = jax.eval_shape(begin, denoiser, batch)
    later = loop.after(conditions) if ahead else loop
    stepped = later.batch, jax.ShapeDtypeStruct((), jnp.int32), x, state
    first = next(iter(tokens))
    steps = job.recipe.schedule.steps
    programs = [
        Program("encode", "text", text, (tokens[first],), encode, encoded[first], len(tokens)),
        Program("begin", "denoiser", denoiser, (batch,), begin, begun, 1),
        Program(
            "step",
            "denoiser",
            later.modules,
            stepped,
            step,
            jax.eval_shape(step, later.modules, *stepped),
            steps,
            donated=True,
        ),
        Program("decode", "vae", vae, (x,), decode, jax.eval_shape(decode, vae, x), 1),
    ]
    return [dataclasses.replace(one, attention=used.get(one.name, {})) for one in programs], encoded


def make_job(skeletons: Skeletons, given: Mapping[str, Any]) -> Job:
    """Makes the job of a picture with these settings. **Raises:** `SettingError`."""
    request = dataclasses.replace(skeletons.request, settings=given)
    return Job.make(skeletons.blueprint, 0, request)


def as_shapes(tree: PyTree) -> PyTree:
    """Returns the shapes and dtypes of a PyTree's arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def nbytes(tree: PyTree) -> int:
    """Returns the bytes of a PyTree's arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
