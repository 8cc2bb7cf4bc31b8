"""Counts the static cycles of attention on TPUs, for programs that are compiled without a TPU.

    python benchmarks/tpu_attention.py --generations v6e v5e --shapes flux sdxl --out table.md

It needs `pip install libtpu` in the version that JAX pins. The compiler writes the final schedule
of each kernel: bundles of instructions, of which a core issues one in a cycle. The script counts
the bundles of the loop over the grid, times its trips; a region that a branch may skip counts as
often as the kernel enters it. What the schedule does not show, which is waiting for memory and for
a full matrix unit, is in a second figure: the least cycles that the matrix units need for the
products as the kernel issues them. The printed time is the larger one.
"""

import argparse
import dataclasses
import functools
import glob
import itertools
import os
import re
import shutil
import sys
import tempfile
import time


DUMP = tempfile.mkdtemp(prefix="tpu_attention_")
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
    splash_attention_mask as masks,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqxdiff.kernels import _attention_pallas_tpu as ours


@dataclasses.dataclass(frozen=True)
class Generation:
    """A chip: a topology of it, its clock in GHz and the cycles of one product instruction."""

    topology: str
    device: str
    clock: float
    product: float
    """Cycles for which an instruction occupies the matrix units, divided by their number."""


GENERATIONS = {
    "v4": Generation("v4:2x2x1", "TPU v4", 1.05, 2),
    "v5e": Generation("v5e:1x1", "TPU v5 lite", 1.5, 2),
    "v5p": Generation("v5p:2x2x1", "TPU v5", 1.75, 2),
    "v6e": Generation("v6e:1x1", "TPU v6 lite", 1.75, 4),
}

# Queries, keys, heads, dimension of a head.
SHAPES = {
    "flux": (4608, 4608, 24, 128),
    "flux-256": (4352, 4352, 24, 128),
    "sdxl": (4096, 4096, 10, 64),
    "sdxl-low": (1024, 1024, 20, 64),
    "sdxl-cross": (4096, 77, 10, 64),
    "sd2": (9216, 9216, 5, 64),
    "sd2-2304": (2304, 2304, 10, 64),
    "sd2-576": (576, 576, 20, 64),
    "sd2-144": (144, 144, 20, 64),
    "sd1-40": (4096, 4096, 8, 40),
    "sd1-80": (1024, 1024, 8, 80),
    "sd1-160": (256, 256, 8, 160),
    "vae": (16384, 16384, 1, 512),
    "t5": (512, 512, 64, 64),
    "clip": (77, 77, 12, 64),
    "qwen3": (512, 512, 32, 128),
}


def compiled(generation: Generation, function, *shapes) -> tuple[str, float]:
    """Compiles a function of bfloat16 arrays: the schedule of its kernel, and the seconds."""
    one = {"chips_per_host_bounds": [1, 1, 1]} if generation.topology.endswith("1x1") else {}
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=generation.topology, **one
    ).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    for path in glob.glob(f"{DUMP}/*"):
        os.remove(path)
    call = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(),) * len(arrays),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    start = time.perf_counter()
    jax.jit(call).lower(*arrays).compile()
    seconds = time.perf_counter() - start
    for path in glob.glob(f"{DUMP}/*final_bundles.txt"):
        if not re.search("schedule|TLP|late-", os.path.basename(path)):
            with open(path, errors="replace") as file:
                text = file.read()
            if "vmatmul" in text:
                return text, seconds
    raise RuntimeError("The compiler has written no schedule of a kernel with products.")


@dataclasses.dataclass(frozen=True)
class Span:
    """Bundles from `first` to before `last`."""

    first: int
    last: int

    def __contains__(self, other: "Span") -> bool:
        return self.first <= other.first and other.last <= self.last and self != other


class Schedule:
    """The bundles of a kernel, its loops and the regions that a branch may skip."""

    def __init__(self, text: str):
        self.bundles: list[str] = []
        for line in text.splitlines():
            if re.match(r"\s*(0x[0-9a-f]+|0)\s+[A-Z ,]*:", line):
                self.bundles.append(line)
            elif self.bundles:
                self.bundles[-1] += "\n" + line
        starts, jumps = {}, []
        for place, bundle in enumerate(self.bundles):
            for region in re.findall(r"Start(?:/End empty)? region (\d+)", bundle):
                starts[region] = place
            for region in re.findall(r"sbr\.rel.*? target = \$region(\d+)", bundle):
                jumps.append((place, region))
        known = [(place, starts[region]) for place, region in jumps if region in starts]
        self.loops = [Span(to, place + 1) for place, to in known if to <= place]
        self.loops.sort(key=lambda span: span.first - span.last)
        self.regions = [Span(place + 1, to) for place, to in known if to > place + 1]

    def products(self, span: Span) -> int:
        """Counts the instructions of the matrix unit, in the bundles and not in the comments."""
        text = "\n".join(self.bundles[span.first : span.last])
        return len(re.findall(r"= vmatmul|vmatmul\.", re.sub(r"/\*.*?\*/", "", text, flags=re.S)))

    def cycles(self, programs: int, blocks: int, trips: int) -> tuple[float, float]:
        """Counts the bundles that the grid issues, and those products.

        **Arguments:**

        - `programs`: trips of the loop over the grid.
        - `blocks`: of keys, for one block of queries: regions without products, such as the
            beginning and the end of the sums, are entered once for so many programs.
        - `trips`: of a loop in the kernel.
        """
        grid = self.loops[0]
        bundles, products = self._count(grid, blocks)
        for loop in self.loops[1:]:
            more, again = self._count(loop, blocks)
            bundles, products = (
                bundles + (trips - 1) * (more if again else 0),
                products + (trips - 1) * again,
            )
        return bundles * programs, products * programs

    def _count(self, span: Span, blocks: int) -> tuple[float, float]:
        """Counts a span; of regions with products beside each other the longest alone counts."""
        inside = [region for region in self.regions if region in span]
        outer = [one for one in inside if not any(one in other for other in inside)]
        bundles = span.last - span.first - sum(one.last - one.first for one in outer)
        products = self.products(span) - sum(map(self.products, outer))
        working = [one for one in outer if self.products(one)]
        bundles += sum(one.last - one.first for one in outer if one not in working) / blocks
        if working:
            longest = max(working, key=lambda one: one.last - one.first)
            more, again = self._count(longest, blocks)
            bundles, products = bundles + more, products + again
        return bundles, products


@dataclasses.dataclass(frozen=True)
class Count:
    """What one kernel takes: cycles of the schedule, the least of the matrix units, and the ms."""

    name: str
    scheduled: float
    needed: float
    clock: float
    seconds: float

    @property
    def ms(self) -> float:
        return max(self.scheduled, self.needed) / self.clock / 1e6


def count(generation, name, function, shapes, programs, blocks, trips=1) -> Count | None:
    """Compiles and counts one kernel, or says why not."""
    try:
        text, seconds = compiled(generation, function, *shapes)
    except Exception as error:
        print(f"    {name}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        return None
    cycles, products = Schedule(text).cycles(programs, blocks, trips)
    return Count(name, cycles, products * generation.product, generation.clock, seconds)


def count_ours(generation: Generation, shape, bounded: bool) -> Count | None:
    queries, keys, heads, dim = shape
    arrays = [(1, queries, heads, dim), (1, keys, heads, dim), (1, keys, heads, dim)]
    options = {"scale": dim**-0.5, "bounded": bounded, "device": generation.device}
    tiling = ours.tile(
        *(jax.ShapeDtypeStruct(a, jnp.bfloat16) for a in arrays), None, blocks=None, **options
    )
    ceil = lambda a, b: -(-a // b)
    blocks = ceil(keys, tiling.columns)
    programs = ceil(heads, tiling.pair) * ceil(queries, tiling.rows) * blocks
    call = lambda q, k, v: ours.attend(
        q, k, v, None, None, None, blocks=None, interpret=False, **options
    )
    name = f"{'bounded' if bounded else 'online'} {tiling.rows}/{tiling.columns}/{tiling.chunk}"
    return count(generation, name, call, arrays, programs, blocks)


def count_splash(generation: Generation, shape, sizes: tuple[int, int, int]) -> Count | None:
    queries, keys, heads, dim = shape
    rows, columns, compute = sizes
    mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads)
    block_sizes = splash.BlockSizes(block_q=rows, block_kv=columns, block_kv_compute=compute)
    kernel = splash.make_splash_mha(
        mask=mask, head_shards=1, q_seq_shards=1, block_sizes=block_sizes
    )
    call = lambda q, k, v: kernel((q * dim**-0.5).astype(q.dtype), k, v)
    blocks = -(-keys // columns)
    programs = heads * -(-queries // rows) * blocks
    arrays = (heads, queries, dim), (heads, keys, dim), (heads, keys, dim)
    name = f"splash {rows}/{columns}/{compute}"
    return count(generation, name, call, arrays, programs, blocks, columns // compute)


def count_flash(generation: Generation, shape, sizes: tuple[int, int, int]) -> Count | None:
    queries, keys, heads, dim = shape
    rows, columns, compute = sizes
    block_sizes = BlockSizes(block_q=rows, block_k_major=columns, block_k=compute, block_b=1)
    call = functools.partial(flash_attention, sm_scale=dim**-0.5, block_sizes=block_sizes)
    blocks = keys // columns
    arrays = (1, heads, queries, dim), (1, heads, keys, dim), (1, heads, keys, dim)
    name = f"flash {rows}/{columns}/{compute}"
    programs = heads * (queries // rows) * blocks
    return count(generation, name, call, arrays, programs, blocks)


def block_choices(queries: int, keys: int) -> list[tuple[int, int, int]]:
    """Lists the blocks of the stock kernels that divide a shape, the large ones."""
    divides = lambda n: [size for size in (2048, 1536, 1024, 768, 512, 256, 128) if n % size == 0]
    pairs = itertools.product(divides(queries)[:2], divides(keys)[:2])
    return [(rows, columns, min(columns, 512)) for rows, columns in pairs if columns % 128 == 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", nargs="+", choices=GENERATIONS, default=list(GENERATIONS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--alone", action="store_true", help="leave the stock kernels out")
    parser.add_argument("--out", help="also write the table to this file")
    args = parser.parse_args()
    rows = [
        "| chip | shape | ours, online | ours, bounded | splash, best blocks | flash | "
        "splash / online | splash / bounded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(rows), flush=True)
    for name, shape in itertools.product(args.generations, args.shapes):
        generation, sizes = GENERATIONS[name], SHAPES[shape]
        online, bounded = (count_ours(generation, sizes, each) for each in (False, True))
        choices = [] if args.alone or sizes[3] > 128 else block_choices(*sizes[:2])
        stock = [
            min(
                filter(None, (kernel(generation, sizes, blocks) for blocks in choices)),
                key=lambda one: one.ms,
                default=None,
            )
            for kernel in (count_splash, count_flash)
        ]
        cell = lambda one: (
            "-"
            if one is None
            else (
                f"{max(one.scheduled, one.needed) / 1e6:.3f} M, {one.ms:.3f} ms "
                f"({one.name.split(maxsplit=1)[1]})"
            )
        )
        ratio = lambda a, b: f"{a.ms / b.ms:.2f}" if a and b else "-"
        cells = [cell(one) for one in (online, bounded, *stock)]
        cells += [ratio(stock[0], one) for one in (online, bounded)]
        text = " x ".join(map(str, sizes))
        rows.append(f"| {name} | {shape} {text} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    if args.out:
        with open(args.out, "w") as file:
            file.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(DUMP, ignore_errors=True)
