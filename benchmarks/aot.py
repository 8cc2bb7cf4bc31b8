"""Compiles for a TPU without one, and reads the compiler's static cycles of the program.

Needs libtpu (`pip install libtpu==0.0.42.1` with JAX 0.10.2). Import it before JAX does anything.
"""

import collections
import dataclasses
import os
import re
import time
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


CLOCK = {"v6e": 1.75e9, "v5e": 1.5e9}
VMEM = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
KERNEL = "custom-call"


def set_environment() -> None:
    """Says to libtpu that there is no TPU, and lets other processes use it at the same time."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        TPU_LOG_DIR="disabled",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def one_chip(generation: str = "v6e") -> Mesh:
    """Returns a mesh of one chip."""
    chip = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{generation}:1x1", chips_per_host_bounds=[1, 1, 1]
    ).devices[0]
    return Mesh(np.array([chip]), ("chip",))


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a program.

    **Fields:**

    - `milliseconds`: the static time of all its operations, by kind.
    - `largest`: milliseconds, kind, shape and name of the operations that take longest.
    - `kernels`: how often a Pallas kernel is called; its time is in no other figure.
    - `arguments`, `temporary`: bytes on the device.
    - `compile_s`: CPU seconds of the compilation.
    """

    milliseconds: dict[str, float]
    largest: list[tuple[float, str, str, str]]
    kernels: int
    arguments: int
    temporary: int
    compile_s: float

    @property
    def total(self) -> float:
        """The milliseconds of all but the kernels."""
        return sum(self.milliseconds.values())


def compile_for(mesh: Mesh, function: Any, *args: Any, options: Any = None, donate: Any = ()):
    """Compiles a function of PyTrees of `jax.ShapeDtypeStruct`s for the mesh; reports on it."""
    place = NamedSharding(mesh, PartitionSpec())
    shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    arrays, static = eqx.partition(args, shape)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays)

    def run(*arrays):
        return function(*eqx.combine(arrays, static))

    lowered = jax.jit(run, donate_argnums=donate).lower(*arrays)
    began = time.process_time()
    compiled = lowered.compile(compiler_options=options)
    return report(compiled, time.process_time() - began)


def report(compiled: Any, seconds: float, generation: str = "v6e") -> Report:
    """Sums the static cycles of a program, with those of a loop's body as often as it runs."""
    bodies, main = _computations(compiled.as_text())
    times: dict[str, float] = collections.defaultdict(float)
    largest: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    kernels = 0

    def walk(name: str, often: int) -> None:
        nonlocal kernels
        for line in bodies[name]:
            if found := re.search(r'"estimated_cycles":"(\d+)"', line):
                ms = often * int(found[1]) / CLOCK[generation] * 1e3
                what = kind(line)
                times[what] += ms
                largest[what, _shape(line), _name(line)] += ms
            if " custom-call(" in line and "tpu_custom_call" in line:
                kernels += often
            if found := re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                walk(found[2], often * _trips(bodies[found[1]]))
            for called in re.findall(r" call\(.*to_apply=%([\w.\-]+)", line):
                walk(called, often)

    walk(main, 1)
    memory = compiled.memory_analysis()
    falling = lambda times: sorted(times.items(), key=lambda item: -item[1])
    top = [(round(ms, 2), *key) for key, ms in falling(largest)[:16]]
    return Report(
        {name: round(ms, 2) for name, ms in falling(times)},
        top,
        kernels,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        round(seconds, 1),
    )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation of a program by its name, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    name = main = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            name = found[2]
            main = name if found[1] else main
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, main


def _trips(condition: list[str]) -> int:
    """Returns how often a loop runs whose counter is compared with a constant."""
    found = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(found[0]) if found else 1


def _name(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1].rpartition("closed_call/")[2][-60:] if found else ""


def _shape(line: str) -> str:
    return line.strip().partition(" = ")[2][:44].partition(" fusion")[0]


def kind(line: str) -> str:
    """Names the kind of an operation of the compiled program by what its result is."""
    name = _name(line)
    if "rope" in name:
        return "rope"
    if "attention" in name:
        return "attention"
    if "conv_general" in name:
        return "convolution"
    if "dot_general" in name:
        return "linear"
    operation = re.search(r" ([a-z\-]+)\(", line.partition(" = ")[2])
    moves = ("transpose", "reshape", "concatenate", "slice", "copy", "split", "squeeze")
    if (operation and operation[1].startswith("copy")) or name.rpartition("/")[2] in moves:
        return "layout"
    return "norms and others"
