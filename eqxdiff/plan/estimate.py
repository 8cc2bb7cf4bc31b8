"""What a picture needs on each device of a machine: memory, operations, bytes and time."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType

from .._errors import SettingError
from ..checkpoint import leaf_paths
from ..kernels import AttentionChoice
from ..models import Component, check_range
from ..sharding import (
    AXES,
    BATCH_AXES,
    check_picture,
    check_weights,
    logical_axes,
    parameter_sharding,
)
from .count import Cost, count
from .shapes import Program, Skeletons, make_job, make_programs, nbytes
from .targets import Target
from .training import training_program


Keep = Literal["device", "host", "nowhere"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a picture is made, as far as a plan depends on it.

    **Fields:**

    - `settings`: as given, by name.
    - `batch_size`: pictures at once on all devices; `None` is one for each part of a batch.
    - `mesh`: axis -> its size.
    - `keep`: where the text encoders are while pictures are sampled.
    - `train`: whether a LoRA is trained in place of making pictures.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    keep: Keep = "device"
    train: bool = False

    def size(self, axis: str) -> int:
        """Returns the size of an axis of the mesh."""
        return self.mesh.get(axis, 1)

    @property
    def parts(self) -> int:
        """The number of parts that a batch is split into."""
        return math.prod(self.size(axis) for axis in BATCH_AXES)

    @property
    def pictures(self) -> int:
        """The pictures of a batch."""
        return self.parts if self.batch_size is None else self.batch_size

    def check(self, target: Target) -> None:
        """**Raises:** `SettingError` where devices are too few, or a batch is not divided."""
        check_range("batch_size", self.pictures, 1)
        devices = math.prod(self.mesh.values())
        if devices > target.devices:
            raise SettingError(
                f"`mesh` {spell_mesh(self.mesh)} has {devices} devices and {target.name} has "
                f"{target.devices}."
            )
        if self.pictures % self.parts:
            axes = " and ".join(axis for axis in BATCH_AXES if self.size(axis) > 1)
            fits = [str(n) for n in range(1, self.pictures + 1) if self.pictures % n == 0]
            raise SettingError(
                f"`mesh` {spell_mesh(self.mesh)} splits a batch over {axes} into {self.parts} "
                f"parts, which does not divide `batch_size` {self.pictures}: sizes that do are "
                f"{', '.join(fits)}; or give a multiple of {self.parts} pictures."
            )


def spell_mesh(mesh: Mapping[str, int]) -> str:
    """Spells a mesh as the command line does."""
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or "data=1"


@dataclasses.dataclass(frozen=True)
class ComponentNeeds:
    """A component: `nbytes` is of the whole, `device` of what one device holds."""

    name: str
    stage: str
    parameters: int
    dtype: str
    nbytes: int
    device: int


@dataclasses.dataclass(frozen=True)
class ProgramNeeds:
    """A program, on one device.

    **Fields:**

    - `calls`: how often it runs for a batch.
    - `flops`: operations of one call.
    - `moved`: bytes that one call moves from and to the device's memory.
    - `collective`: bytes that one call receives from other devices.
    - `arguments`, `temporary`: bytes held meanwhile: weights and inputs, and all else.
    - `seconds`: of one call, by the roofline.
    - `bound`: what the time is that of: `"compute"`, `"memory"` or `"links"`.
    """

    name: str
    calls: int
    flops: float
    moved: float
    collective: float
    arguments: int
    temporary: int
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a batch of pictures needs.

    **Fields:**

    - `peak`: bytes on the device that holds the most.
    - `source`: where the memory of programs comes from: `"formula"` or `"compiler"`.
    - `seconds`: of a batch, by the roofline.
    """

    model: str
    target: Target
    choice: Choice
    settings: Any
    components: tuple[ComponentNeeds, ...]
    programs: tuple[ProgramNeeds, ...]
    peak: int
    source: str
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.peak <= self.target.chip.memory

    def program(self, name: str) -> ProgramNeeds:
        """Returns the needs of a program."""
        return next(one for one in self.programs if one.name == name)


@functools.lru_cache(maxsize=64)
def _programs(
    skeletons: Skeletons,
    settings: tuple[tuple[str, Any], ...],
    batch_size: int,
    on_cpu: bool,
    train: bool,
    context: int,
    tensor: int,
) -> tuple[Any, tuple[tuple[Program, Cost], ...]]:
    """Returns the job, and the programs with their costs on one device."""
    job = make_job(skeletons, dict(settings))
    if not on_cpu:  # whose attention computes in float32
        choice = AttentionChoice(("chunked",), unknown_devices=True)
        own = dataclasses.replace(skeletons.blueprint, attention=choice)
        skeletons = dataclasses.replace(skeletons, blueprint=own)
    found = []
    if train:
        programs = [training_program(skeletons, job, batch_size)]
    else:
        programs, _ = make_programs(skeletons, job, batch_size)
    for program in programs:
        axes = [
            logical_axes(path, leaf.ndim, skeletons.blueprint.components[name].rules)
            for name in sorted(program.weights)  # as JAX orders a dictionary
            for path, leaf in leaf_paths(program.weights[name]).items()
        ]
        split = contextlib.nullcontext()
        if max(context, tensor) > 1 and program.stage != "text":
            sizes = {"context": context, "tensor": tensor}
            split = jax.sharding.use_abstract_mesh(_abstract_mesh(sizes))
        with split:
            arguments = program.weights, *program.inputs
            cost = count(program.function, *arguments, axes=axes, on_cpu=on_cpu)
        found.append((program, cost))
    return job, tuple(found)


def make_plan(
    skeletons: Skeletons,
    target: Target,
    choice: Choice,
    measured: Mapping[str, tuple[int, int]] | None = None,
) -> Forecast:
    """Plans a batch of pictures.

    **Arguments:**

    - `measured`: program -> its arguments' and temporary bytes on one device, as the compiler says.

    **Raises:** `SettingError` for a mesh that does not divide, and for settings out of range.
    """
    choice.check(target)
    blueprint = skeletons.blueprint
    key = tuple(sorted(choice.settings.items()))
    on_cpu = target.chip.topology is None and target.name == "cpu"
    share = choice.pictures // choice.parts
    context, tensor = choice.size("context"), choice.size("tensor")
    job, programs = _programs(skeletons, key, share, on_cpu, choice.train, context, tensor)
    mesh = _abstract_mesh(choice.mesh)
    check_picture(mesh, job.recipe.shape[0], job.recipe.guider.roles)
    for name, component in blueprint.components.items():
        if component.stage == "denoiser":
            leaves = leaf_paths(skeletons.modules[name]).items()
            shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
            check_weights(name, shapes, component.rules, mesh)
    components = tuple(
        _component(name, skeletons.modules[name], component, choice)
        for name, component in blueprint.components.items()
    )
    held = {stage: sum(c.device for c in components if c.stage == stage) for stage in STAGES}
    needs, peak = [], 0
    for program, cost in programs:
        inputs = nbytes(program.inputs)
        needed = _needs(program, cost, skeletons, target, choice)
        if measured is not None and program.name in measured:
            arguments, temporary = measured[program.name]
            needed = dataclasses.replace(needed, arguments=arguments, temporary=temporary)
            inputs = arguments - held[program.stage]
        needs.append(needed)
        resident = held["text"] if program.stage == "text" else sum(held.values())
        if choice.train:
            resident = held["denoiser"]
        elif choice.keep != "device" and program.stage != "text":
            on_host = target.name == "cpu" and choice.keep == "host"
            resident -= 0 if on_host else held["text"]
        peak = max(peak, resident + max(inputs, 0) + needed.temporary)
    return Forecast(
        blueprint.name,
        target,
        choice,
        job.settings,
        components,
        tuple(needs),
        int(peak + target.chip.overhead),
        "formula" if measured is None else "compiler",
        sum(one.seconds * one.calls for one in needs),
    )


STAGES = ("text", "denoiser", "vae")


def _abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    shape, types = tuple(sizes.get(axis, 1) for axis in AXES), (AxisType.Auto,) * len(AXES)
    return AbstractMesh(shape, AXES, axis_types=types)


def _shares(
    module: Any, component: Component, sizes: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Returns the bytes of each leaf, whole and on one device."""
    mesh, shares = _abstract_mesh(sizes), {}
    for path, leaf in leaf_paths(module).items():
        sharding = parameter_sharding(path, tuple(leaf.shape), component.rules, mesh)
        own = math.prod(sharding.shard_shape(tuple(leaf.shape)))
        shares[path] = leaf.size * leaf.dtype.itemsize, own * leaf.dtype.itemsize
    return shares


def _component(name: str, module: Any, component: Component, choice: Choice) -> ComponentNeeds:
    leaves = leaf_paths(module)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
    shares = _shares(module, component, choice.mesh)
    return ComponentNeeds(
        name,
        component.stage,
        sum(leaf.size for leaf in leaves.values()),
        ", ".join(dtypes),
        sum(whole for whole, _ in shares.values()),
        sum(own for _, own in shares.values()),
    )


def _needs(
    program: Program, cost: Cost, skeletons: Skeletons, target: Target, choice: Choice
) -> ProgramNeeds:
    chip, stage = target.chip, program.stage
    tensor, context = choice.size("tensor"), choice.size("context")
    # A text is not split over `fsdp`, so that each device computes with its own part of the weights
    # and the sums go round, which are small beside the weights.
    ways = context if stage != "text" else choice.size("fsdp")
    if stage == "denoiser" and guided(program):
        ways *= choice.size("cfg")
    share = 1 / ways
    whole = cost.operations
    split = cost.split / whole if whole else 0.0
    scale = share * ((1 - split) + split / tensor)
    flops = {dtype: amount * scale for dtype, amount in cost.flops.items()}
    read = gathered = held = block = 0
    tensor_alone = choice.mesh if stage == "text" else {**choice.mesh, "fsdp": 1}
    for name, module in program.weights.items():
        component = skeletons.blueprint.components[name]
        once = _shares(module, component, tensor_alone)
        own = _shares(module, component, choice.mesh)
        held += sum(device for _, device in own.values())
        if not whole:  # the network is not run, and its weights are not fetched
            continue
        read += sum(device for _, device in once.values())
        if stage == "text":
            continue
        gathered += sum(once[path][1] - own[path][1] for path in own)
        block = max(block, _layer(module, component, once, own))
    collective = gathered + 2 * cost.reduced * share * (tensor - 1) / tensor + cost.passed
    moved = read + cost.traffic * share
    times = {
        "compute": sum(
            amount / (chip.wide if dtype in ("float32", "float64") else chip.narrow)
            for dtype, amount in flops.items()
        ),
        "memory": moved / chip.bandwidth,
        "links": collective / chip.link,
    }
    bound = max(times, key=lambda name: times[name])
    calls = program.calls + (choice.pictures - 1 if stage == "text" else 0)
    return ProgramNeeds(
        program.name,
        calls,
        sum(flops.values()),
        moved,
        collective,
        held + nbytes(program.inputs),
        int(cost.temporary * share) + block,
        times[bound],
        bound,
    )


def guided(program: Program) -> bool:
    """Tells whether a program of the denoiser asks the network of two conditions."""
    conditions = getattr(program.inputs[0], "conditions", None)
    shapes = [leaf.shape for leaf in jax.tree.leaves(conditions)]
    return bool(shapes) and all(len(shape) > 1 and shape[1] == 2 for shape in shapes)


def _layer(
    module: Any,
    component: Component,
    once: Mapping[str, tuple[int, int]],
    own: Mapping[str, tuple[int, int]],
) -> int:
    """Returns the bytes of gathered weights at a time: two layers, one in use and the next."""
    layers: dict[str, float] = {}
    for path, leaf in leaf_paths(module).items():
        if once[path][1] == own[path][1]:
            continue
        axes = logical_axes(path, leaf.ndim, component.rules)
        stacked = math.prod(n for n, a in zip(leaf.shape, axes, strict=True) if a == "layers")
        group = path.split(".")[0] if stacked > 1 else path
        layers[group] = layers.get(group, 0.0) + once[path][1] / stacked
    return int(2 * max(layers.values(), default=0.0))
