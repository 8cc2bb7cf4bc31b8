"""The programs of a picture, compiled ahead of time in one file.

The file is a zip archive of `header.json` and one export of `jax.export` for each program. Each
takes and returns plain arrays in the order of `jax.tree.leaves`, the weights first; a random key
stands as its words. The header states for whom the programs are.

JAX reads an export that was made up to six months before, with the calling convention that it
states (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees); one that was
made by a later JAX is refused.
"""

import dataclasses
import hashlib
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jax import export
from jaxtyping import PyTree

from .._errors import SettingError, SourceError
from ..kernels import attention_for
from ..models import tiles
from ..pipeline import Blueprint, Job, Programs
from ..pipeline.sample import Loop
from ..sampling import Row
from .shapes import Program, Skeletons, as_shapes, make_programs


SCHEMA = 1
"""The version of the file's layout."""

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

CUSTOM_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2")
"""The kernels of Pallas, whose own versions JAX checks when it runs them."""


def compile_picture(
    blueprint: Blueprint, job: Job, batch_size: int = 1, platform: str | None = None
) -> bytes:
    """Compiles the programs that make pictures like that of a job, and returns the file.

    **Arguments:**

    - `platform`: `"cpu"`, `"cuda"`, `"rocm"` or `"tpu"`, by default that of JAX here.

    **Raises:** `SettingError` where such pictures cannot be compiled ahead of time.
    """
    platform = platform or here()
    check_plain(blueprint, job)
    if platform != here():
        blueprint = dataclasses.replace(blueprint, attention=attention_for(platform))
    skeletons = Skeletons.of(blueprint)
    programs, encoded = make_programs(skeletons, job, batch_size)
    weights: dict[str, str] = {}
    for one in programs:  # the first program of a stage takes all of its weights
        weights.setdefault(one.stage, signature(one.weights))
    header = {
        "schema": SCHEMA,
        "platform": platform,
        "jax": jax.__version__,
        **facts(blueprint, job, batch_size),
        "weights": weights,
        "state": len(jax.tree.leaves(programs[1].outputs[1])),
        "inputs": {one.name: signature(one.inputs) for one in programs},
        "attention": {one.name: dict(one.attention) for one in programs},
        "encoded": describe_tree(encoded[next(iter(encoded))]),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(header, indent=1))
        for program in programs:
            archive.writestr(f"{program.name}.export", export_program(program, platform))
    return file.getvalue()


def export_program(program: Program, platform: str) -> bytes:
    """Exports a program as a function of plain arrays."""
    arguments = (program.weights, *program.inputs)
    leaves, structure = jax.tree.flatten(arguments)

    def run(*arrays: Any) -> tuple[Any, ...]:
        full = [wrap(array, leaf.dtype) for array, leaf in zip(arrays, leaves, strict=True)]
        results = program.function(*jax.tree.unflatten(structure, full))
        return tuple(unwrap(leaf) for leaf in jax.tree.leaves(results))

    shapes = jax.eval_shape(lambda *each: tuple(unwrap(leaf) for leaf in each), *leaves)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    made = export.export(jax.jit(run), platforms=(platform,), disabled_checks=checks)(*shapes)
    return bytes(made.serialize())


def wrap(array: Any, dtype: Any) -> Any:
    """Makes a random key of its words; other arrays stay as they are."""
    if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(array, impl="threefry2x32")
    return array


def unwrap(leaf: Any) -> Any:
    """Returns the words of a random key, and other arrays as they are."""
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def here() -> str:
    """Returns the platform of the default device, as `jax.export` calls it."""
    backend = jax.default_backend()
    return {"gpu": "cuda"}.get(backend, backend)


def facts(blueprint: Blueprint, job: Job, batch_size: int) -> dict[str, Any]:
    """Returns what a user chooses of the programs."""
    settings = job.settings
    return {
        "model": blueprint.name,
        "compute_dtype": str(blueprint.compute_dtype),
        "size": f"{settings.width}x{settings.height}",
        "steps": job.recipe.schedule.steps,
        "batch_size": batch_size,
        "vae_tiling": tiles(settings),
        "sampling": signature((job.recipe, {r: text.tokens for r, text in job.texts.items()})),
    }


def check_plain(blueprint: Blueprint, job: Job) -> None:
    """**Raises:** `SettingError` for pictures that are made from more than prompts."""
    if job.encodes or job.request.controls or not job.texts:
        raise SettingError("`compiled` programs make pictures from prompts alone.")
    if blueprint.mesh is not None:
        raise SettingError("`compiled` programs run on one device: leave out `mesh`.")


def signature(tree: PyTree) -> str:
    """Returns a digest of the structure, shapes and dtypes of a PyTree."""
    leaves, structure = jax.tree.flatten(as_shapes(tree))
    text = re.sub(r" at 0x[0-9a-f]+", "", str(structure))
    text += "".join(f"{leaf.shape}{leaf.dtype}" for leaf in leaves)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Artefact:
    """Programs that were compiled ahead of time.

    **Fields:**

    - `name`: what errors call it.
    - `header`: for whom the programs are.
    - `exports`: the programs by name.
    """

    name: str
    header: dict[str, Any]
    exports: dict[str, export.Exported]

    @classmethod
    def read(cls, path: str | Path) -> "Artefact":
        """Reads a file of `compile_picture`.

        **Raises:** `SourceError` where it is none or is damaged, `SettingError` where this JAX does
        not run it.
        """
        name = str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                header = json.loads(archive.read("header.json"))
                data = {one: archive.read(f"{one}.export") for one in header["inputs"]}
        except OSError as error:
            raise SourceError(f"{name} cannot be read: {error.strerror}.") from None
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError):
            raise SourceError(f"{name} is no file of `eqxdiff compile`, or is damaged.") from None
        if header.get("schema") != SCHEMA:
            raise SettingError(f"{name} was made by another version of eqxdiff: compile it again.")
        made = header["jax"]
        if version(made) > version(jax.__version__):
            raise SettingError(
                f"{name} was made with JAX {made}, and this is JAX {jax.__version__}: JAX runs "
                "programs of earlier versions up to six months old. Compile it again."
            )
        try:
            exports = {one: export.deserialize(bytearray(own)) for one, own in data.items()}
        except Exception as error:  # of the flat buffers or of the convention's version
            raise SettingError(
                f"{name} was made with JAX {made}, which JAX {jax.__version__} does not run "
                f"({str(error).splitlines()[0][:120]}): compile it again."
            ) from None
        return cls(name, header, exports)

    def check(self, blueprint: Blueprint, jobs: Iterable[Job], batch_size: int) -> None:
        """Checks before weights are read that these programs make the pictures.

        **Raises:** `SettingError` with the reason why they do not.
        """
        own = self.header
        if own["platform"] != here():
            raise SettingError(f"{self.name} is for {own['platform']}, and JAX runs on {here()}.")
        for job in jobs:
            check_plain(blueprint, job)
            for name, value in facts(blueprint, job, batch_size).items():
                if name == "sampling" and own[name] != value:
                    raise SettingError(
                        f"{self.name} was compiled for another sampler, other guidance or another "
                        "length of the prompts: compile it with the same settings."
                    )
                if own[name] != value:
                    raise SettingError(
                        f"{self.name} is for {name.replace('_', ' ')} {own[name]}, not {value}: "
                        "compile it again."
                    )
        for stage, wanted in own["weights"].items():
            names = blueprint.names(stage)
            if signature({name: blueprint.shapes(name) for name in names}) != wanted:
                raise SettingError(
                    f"{self.name} is for other weights of {' and '.join(names)}: their shapes, "
                    "dtypes or LoRAs differ."
                )

    def programs(self) -> Programs:
        """Returns the programs, which run without JAX tracing a network."""
        calls = {name: jax.jit(made.call) for name, made in self.exports.items()}

        def run(name: str, weights: Any, *inputs: Any) -> list[Any]:
            if signature(inputs) != self.header["inputs"][name]:
                raise SettingError(f"{self.name} is for other pictures: compile it again.")
            leaves = jax.tree.leaves((weights, *inputs))
            return list(calls[name](*map(unwrap, leaves)))

        used = self.header["attention"]

        def encode(blueprint: Blueprint, modules: Any, tokens: PyTree) -> tuple[PyTree, Any]:
            package = type(blueprint.model).__module__.split(".")[0]
            leaves = iter(run("encode", modules, tokens))
            return rebuild(self.header["encoded"], leaves, package), used["encode"]

        def begin(loop: Loop) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
            x, *rest = run("begin", loop.modules, loop.batch)
            state = self.header["state"]
            return x, tuple(rest[:state]), tuple(rest[state:])

        def advance(fixed: Any, x: Any, state: PyTree) -> tuple[Any, ...]:
            loop, index = fixed
            arrays = jax.tree.leaves((loop.modules, loop.batch, index, x, state))
            x, x0, alpha, sigma, timestep, *state = calls["step"](*map(unwrap, arrays))
            return x, x0, Row(alpha, sigma, timestep), tuple(state), used["step"]

        def decode(_: Blueprint, modules: Any, latents: Any, tiled: bool) -> tuple[Any, Any]:
            return run("decode", modules, latents)[0], used["decode"]

        return Programs(encode, begin, advance, decode)


def version(text: str) -> tuple[int, ...]:
    """Returns the numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def describe_tree(tree: PyTree) -> Any:
    """Returns the structure of a PyTree of modules, tuples and dictionaries as JSON.

    **Raises:** `SettingError` where it has anything else in it.
    """
    if tree is None or isinstance(tree, jax.ShapeDtypeStruct):
        return None if tree is None else "array"
    if isinstance(tree, dict):
        return {"dict": {key: describe_tree(tree[key]) for key in sorted(tree)}}
    if isinstance(tree, tuple) and type(tree) is tuple:
        return {"tuple": [describe_tree(one) for one in tree]}
    if isinstance(tree, eqx.Module):
        fields = dataclasses.fields(tree)
        if not any(field.metadata.get("static") for field in fields):
            kind = type(tree)
            own = {field.name: describe_tree(getattr(tree, field.name)) for field in fields}
            return {"class": [kind.__module__, kind.__qualname__], "fields": own}
    raise SettingError(f"{type(tree).__name__} cannot be kept in a file of compiled programs.")


def rebuild(description: Any, leaves: Any, package: str) -> PyTree:
    """Makes the PyTree that `describe_tree` described.

    **Arguments:**

    - `leaves`: an iterator of its arrays.
    - `package`: the package whose classes it may be made of; nothing is imported.
    """
    if description is None:
        return None
    if description == "array":
        return next(leaves)
    if "dict" in description:
        return {key: rebuild(one, leaves, package) for key, one in description["dict"].items()}
    if "tuple" in description:
        return tuple(rebuild(one, leaves, package) for one in description["tuple"])
    module, name = description["class"]
    kind = getattr(sys.modules.get(module), name, None)
    known = module.split(".")[0] == package and isinstance(kind, type)
    if kind is None or not known or not issubclass(kind, eqx.Module):
        raise SettingError(f"The compiled programs name a class {name} that is not known here.")
    fields = {key: rebuild(one, leaves, package) for key, one in description["fields"].items()}
    return kind(**fields)
