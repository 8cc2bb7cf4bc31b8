"""What the compiler for TPUs says of a program, on a machine without a TPU."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .shapes import Program


class Compiled(NamedTuple):
    """The compiler's figures of a program, for each device."""

    arguments: int
    """The bytes of the arguments."""

    temporary: int
    """The bytes that are held besides arguments and results."""

    results: int
    """The bytes of the results that take no argument's place."""

    seconds: float
    """The time that the compiler estimates, where it does."""

    collectives: int
    """The bytes that collectives take on one device, those in a loop counted in each turn."""


def has_compiler() -> bool:
    """Tells whether `libtpu` is installed, which holds the compiler."""
    return importlib.util.find_spec("libtpu") is not None


def topology_mesh(topology: str, sizes: Mapping[str, int]) -> Mesh:
    """Makes a mesh of the devices of a TPU that need not exist.

    **Arguments:**

    - `topology`: such as `"v6e:2x2"`.
    - `sizes`: mesh axis -> its size.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    shape = [int(n) for n in topology.split(":")[1].split("x")]
    more = {}
    if math.prod(shape) == 1:
        more["chips_per_host_bounds"] = [1, 1, 1]
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    devices = np.array(found.devices[: math.prod(sizes.values())]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
QUIET |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
QUIET |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""What `libtpu` would otherwise look for on the network."""


def compile_program(
    program: Program, weights: PyTree, mesh: Mesh, batch_axes: Sequence[str]
) -> Compiled:
    """Compiles a program for the devices of a mesh.

    **Arguments:**

    - `weights`: the shapes of the program's weights, with their shardings.
    - `batch_axes`: the axes of the mesh that split a batch.
    """

    def placed(leaf: Any) -> Any:
        split = program.stage != "text" and leaf.ndim > 0
        spec = PartitionSpec(tuple(batch_axes)) if split else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    inputs = jax.tree.map(placed, program.inputs)
    # The latents and the solver's state come last, and are given away.
    given_away = tuple(range(3, 1 + len(inputs))) if program.donated else ()
    jitted = jax.jit(program.function, donate_argnums=given_away)
    compiled = jitted.lower(weights, *inputs).compile()
    memory: Any = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        float(cost.get("optimal_seconds", 0.0)),
        collective_bytes(compiled.as_text() or ""),
    )


WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1, "f64": 8}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
COLLECTIVE = re.compile(
    r"= (?P<out>\([^)]*\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(-start)?\("
)
HEAD = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
WHILE = re.compile(r"while\(.*body=%?(?P<body>[\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collective_bytes(text: str) -> int:
    """Returns the bytes that the collectives of a compiled program give on each device.

    Those in the body of a loop count as often as the loop turns.
    """
    parts: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := HEAD.match(line):
            name = match["name"]
        parts.setdefault(name, []).append(line)
    turns: dict[str, int] = {}
    inside: dict[str, str] = {}
    for own, lines in parts.items():
        for line in lines:
            if match := WHILE.search(line):
                trips = TRIPS.search(line)
                turns[match["body"]] = int(trips[1]) if trips else 1
                inside[match["body"]] = own

    def times(part: str) -> int:
        return turns.get(part, 1) * (times(inside[part]) if part in inside else 1)

    total = 0
    for own, lines in parts.items():
        for line in lines:
            if match := COLLECTIVE.search(line):
                shapes = SHAPE.findall(match["out"])
                sizes = [
                    WIDTHS.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
                    for dtype, dims in shapes
                ]
                total += times(own) * max(sizes, default=0)
    return total
