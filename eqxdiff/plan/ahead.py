"""From what a user asks for to a plan: of a model by name, on a machine by name."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .._errors import SettingError
from ..checkpoint.load import dotted
from ..kernels import choose_attention
from ..pipeline import Blueprint, Job, open_model
from ..sharding import AXES, BATCH_AXES, parameter_sharding
from .advise import advise, auto_mesh, require
from .compiler import Compiled, compile_program, has_compiler, topology_mesh
from .estimate import Choice, Forecast, Keep, make_plan, spell_mesh
from .shapes import Skeletons, make_job, make_programs
from .targets import Target, find_target


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is to be planned.

    **Fields:**

    - `model`, `weights`: as of `eqxdiff.load`; without weights the package's own sizes count.
    - `settings`: of the pictures, by name.
    - `target`: as of `find_target`.
    - `mesh`: such as `"data=4,fsdp=2"`, or `"auto"`.
    - `batch_size`, `keep`: as of `Choice`.
    - `dtype`, `compute_dtype`: as of `eqxdiff.load`.
    - `train`: `"lora"` plans the training of a LoRA.
    - `formula`: whether to ask no compiler.
    """

    model: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: str | None = None
    mesh: str | None = None
    batch_size: int | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    keep: Keep = "device"
    train: str | None = None
    weights: str | None = None
    formula: bool = False


def look_ahead(
    wish: Wish, note: Callable[[str], None] | None = None
) -> tuple[Forecast, str | None]:
    """Plans what is asked for. It reads configs and headers at most.

    **Arguments:**

    - `note`: is told what takes long.

    **Returns:** the plan, and advice where it does not fit.

    **Raises:** `SettingError` for an unknown model, target or setting, or for a mesh that does not
    divide; `SourceError`, `ConfigError` or `CheckpointError` for files.
    """
    target = find_target(wish.target)
    compute = wish.compute_dtype or ("float32" if target.name == "cpu" else "bfloat16")

    @functools.cache
    def skeletons(dtype: str | None) -> Skeletons:
        if wish.weights is None:
            return Skeletons.published(wish.model, dtype=dtype, compute_dtype=compute)
        blueprint = open_model(wish.model, wish.weights, dtype=dtype, compute_dtype=compute)
        return Skeletons.of(blueprint)

    own = skeletons(wish.dtype)
    training = wish.train is not None
    choice = Choice(wish.settings, wish.batch_size, {}, wish.keep, training)
    if wish.mesh is not None and wish.mesh.strip() == "auto":
        plan = auto_mesh(own, target, choice, narrowed=skeletons)
    else:
        mesh = {} if wish.mesh is None else mesh_sizes(wish.mesh, target.devices)
        plan = make_plan(own, target, dataclasses.replace(choice, mesh=mesh))
    asks = target.topology is not None and not training and not wish.formula
    if asks and has_compiler():
        plan = ask_compiler(plan, own, target, note)
    return plan, None if plan.fits else advise(plan, own, skeletons)


def mesh_sizes(text: str, devices: int) -> dict[str, int]:
    """Reads the sizes of a mesh of so many devices. **Raises:** `SettingError`."""
    pairs = [re.fullmatch(r"(\w+)=([1-9]\d{0,5}|-1)", part.strip()) for part in text.split(",")]
    sizes = {pair[1]: int(pair[2]) for pair in pairs if pair is not None}
    if len(sizes) < len(pairs) or not sizes.keys() <= set(AXES):
        raise SettingError(
            f"`mesh` {text} is not understood: write the sizes of some of {', '.join(AXES)}, as in "
            "data=4,fsdp=2, and -1 for the devices that remain."
        )
    known = math.prod(size for size in sizes.values() if size > 0)
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or (rest and devices % known):
        fits = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise SettingError(
            f"`mesh` {text}: the sizes make {known} and leave no whole number for -1 of {devices} "
            f"devices: their product must be one of {fits}."
        )
    return {axis: devices // known if size == -1 else size for axis, size in sizes.items()}


def ask_compiler(
    plan: Forecast, skeletons: Skeletons, target: Target, note: Callable[[str], None] | None = None
) -> Forecast:
    """Returns the plan with the memory of its programs as the compiler for TPUs says."""
    wanted = [one.name for one in plan.programs if one.flops]
    found = measure(skeletons, target, plan.choice, wanted, note)
    measured = {name: (one.arguments, one.temporary + one.results) for name, one in found.items()}
    return make_plan(skeletons, target, plan.choice, measured)


def measure(
    skeletons: Skeletons,
    target: Target,
    choice: Choice,
    wanted: Sequence[str],
    note: Callable[[str], None] | None = None,
) -> dict[str, Compiled]:
    """Compiles programs for a TPU target, and returns what the compiler says of each."""
    assert target.topology is not None
    sizes = {axis: choice.size(axis) for axis in AXES}
    one = target.topology.split(":")[0] + ":1x1"
    alone = math.prod(sizes.values()) == 1 and not target.topology.startswith("v5p")
    mesh = topology_mesh(one if alone else target.topology, sizes)
    attention = choose_attention(mesh=mesh, dtype=skeletons.blueprint.compute_dtype)
    blueprint = dataclasses.replace(skeletons.blueprint, mesh=mesh, attention=attention)
    there = dataclasses.replace(skeletons, blueprint=blueprint)
    job = make_job(there, choice.settings)
    found = {}
    for program in make_programs(there, job, choice.pictures)[0]:
        if program.name not in wanted:
            continue
        if note is not None:
            note(f"compiling {program.name} for {target.name}, which may take minutes")
        weights = {
            name: _placed(module, blueprint.components[name].rules, mesh)
            for name, module in program.weights.items()
        }
        found[program.name] = compile_program(program, weights, mesh, BATCH_AXES)
    return found


def _placed(module: Any, rules: Any, mesh: Mesh) -> Any:
    def place(path: Any, leaf: Any) -> Any:
        sharding = parameter_sharding(dotted(path), tuple(leaf.shape), rules, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, module)


def refuse_what_cannot_fit(
    blueprint: Blueprint, job: Job, batch_size: int, keep: Keep = "device"
) -> None:
    """Checks that this machine has the memory for a batch of pictures, before weights are read.

    Where weights and pictures are small beside the memory nothing is traced.

    **Arguments:**

    - `job`: one of the pictures.

    **Raises:** `SettingError`, with advice.
    """
    mesh = dict(blueprint.mesh.shape) if blueprint.mesh is not None else {}
    target = find_target(None, math.prod(mesh.values()))
    pixels = job.settings.height * job.settings.width
    sizes = [blueprint.nbytes(name) for name in blueprint.components]
    if sum(sizes) + batch_size * pixels * MOST_OF_A_PIXEL < target.chip.memory / 2:
        return
    skeletons = Skeletons.of(blueprint, job.request)
    settings = {k: v for k, v in job.request.settings.items() if v is not None}
    choice = Choice(settings, batch_size, mesh, keep)
    plan = make_plan(skeletons, target, choice)
    require(plan, skeletons, narrowed=lambda dtype: _narrowed(skeletons, dtype))


MOST_OF_A_PIXEL = 16_384
"""More bytes than any program holds for a pixel of a picture."""


def _narrowed(skeletons: Skeletons, dtype: str) -> Skeletons:
    blueprint = dataclasses.replace(skeletons.blueprint, dtype=jnp.dtype(dtype))
    return Skeletons.of(blueprint, skeletons.request)


def describe(plan: Forecast, advice: str | None) -> dict[str, Any]:
    """Returns a plan as JSON."""
    chip, settings = plan.target.chip, plan.settings
    return {
        "model": plan.model,
        "target": plan.target.name,
        "chip": chip.summary,
        "devices": plan.target.devices,
        "mesh": spell_mesh(plan.choice.mesh),
        "batch_size": plan.choice.pictures,
        "work": f"{plan.choice.pictures} of {settings.width}x{settings.height}, "
        + ("one step of a LoRA of rank 16" if plan.choice.train else f"{settings.steps} steps"),
        "components": [
            {
                "name": one.name,
                "stage": one.stage,
                "parameters": one.parameters,
                "dtype": one.dtype,
                "bytes": one.nbytes,
                "device_bytes": one.device,
            }
            for one in plan.components
        ],
        "programs": [
            {
                "name": one.name,
                "calls": one.calls,
                "operations": one.flops,
                "moved_bytes": one.moved,
                "collective_bytes": one.collective,
                "argument_bytes": one.arguments,
                "temporary_bytes": one.temporary,
                "seconds": one.seconds,
                "bound": one.bound,
            }
            for one in plan.programs
        ],
        "peak_bytes": plan.peak,
        "memory_bytes": chip.memory,
        "source": plan.source,
        "seconds": plan.seconds,
        "assumes": {
            "bfloat16_tflops": chip.narrow / 1e12,
            "float32_tflops": chip.wide / 1e12,
            "memory_gb_per_s": chip.bandwidth / 1e9,
            "link_gb_per_s": chip.link / 1e9,
            "runtime_bytes": chip.overhead,
        },
        "fits": plan.fits,
        "advice": None
        if plan.fits
        else f"This fits: {advice}."
        if advice
        else "Nothing known fits.",
    }
