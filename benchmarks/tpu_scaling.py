"""One step of FLUX.1 [dev] and of SDXL at 1024x1024 on TPUs, and decoding 2048x2048, as the
compiler sees them.

Programs are compiled ahead of time by libtpu, without a TPU; nothing is run. For each mesh:

- memory of each device: weights and other arguments, and what the program needs besides;
- bytes that each device receives from others in a step, and their time at the stated bandwidth;
- time of a step: the compiler's own estimate of each operation, in cycles, times the trips of its
  loop. Attention is left out of the compiled program, where a product of q, k and v stands for it.
  Its time is added: operations over the peak times the efficiency that a kernel's schedule had.

    pip install libtpu==0.0.42.1
    python benchmarks/tpu_scaling.py [--only flux-dev:v6e:2x2:fsdp] [--output FILE.jsonl]
    python benchmarks/tpu_scaling.py --table FILE.jsonl

A row is added to the file for each program, so that a run can be stopped and go on.
"""

import argparse
import json
import math
import os
import re
import time
from pathlib import Path
from unittest import mock


os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "0"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from eqxdiff.checkpoint import leaf_paths
from eqxdiff.kernels._mesh import context_form
from eqxdiff.models import find_model
from eqxdiff.models.flux1 import TransformerConfig
from eqxdiff.models.flux1.conditioning import FluxCondition, FluxShared
from eqxdiff.models.flux1.predictor import FluxPredictor
from eqxdiff.models.unet.config import UNetConfig
from eqxdiff.models.unet.network import AddedConditioning
from eqxdiff.models.unet.predictor import UNetCondition, UNetPredictor, UNetShared
from eqxdiff.sampling import (
    ClassifierFree,
    Euler,
    Flow,
    GuidedDenoiser,
    State,
    Unguided,
    flow_schedule,
    step,
)
from eqxdiff.sharding import BATCH_AXES, make_mesh, on_mesh, parameter_sharding
from eqxdiff.vae import AutoencoderKLConfig


CHIPS = {  # TFLOP/s in bfloat16, GHz, GiB, and GB/s of all links to neighbours together
    "v6e": (918, 1.75, 31.25, 448),
    "v5e": (197, 1.5, 15.75, 200),
}
EFFICIENCY = {"v6e": (0.616, 0.40), "v5e": (0.95, 0.80)}  # at 128 and 64 features a head
MESHES = {
    "1x1": {"one": {}},
    "2x2": {
        "ddp": {"data": 4},
        "fsdp": {"fsdp": 4},
        "context": {"context": 4},
        "tensor": {"tensor": 4},
    },
    "2x4": {
        "ddp": {"data": 8},
        "fsdp": {"fsdp": 8},
        "context": {"context": 8},
        "tensor": {"tensor": 8},
    },
}
BF16 = jnp.bfloat16


def stand_in(implementation, scale, bounded, q, k, v, bias, key_length, segments):
    """Reads q, k and v once, in place of attention."""
    seen = jnp.mean(k, axis=0) * jnp.mean(v, axis=0)
    seen = jnp.repeat(seen, q.shape[1] // seen.shape[0], axis=0)
    return q * seen


def flux(mesh, count):
    """Returns the network's arguments as shapes, and how a network is made of them."""
    family, _ = find_model("flux-dev")
    component = family.components["transformer"]
    weights = sharded(component, TransformerConfig(guidance_embeds=True), mesh)
    condition = FluxCondition(array(mesh, count, 1, 512, 4096), array(mesh, count, 1, 768))
    scale = array(mesh, count, dtype=jnp.float32)
    x = array(mesh, count, 128, 128, 16, dtype=jnp.float32)
    make = lambda weights, scale: FluxPredictor(weights, FluxShared(scale), jnp.dtype(BF16))
    schedule = flow_schedule(28)
    return weights, (condition, scale, x), one_step(make, Unguided(), schedule)


def sdxl(mesh, count):
    family, _ = find_model("sdxl")
    component = family.components["unet"]
    config = UNetConfig(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    weights = sharded(component, config, mesh)
    added = AddedConditioning(
        array(mesh, count, 2, 1280), array(mesh, count, 2, 6, dtype=jnp.float32)
    )
    wanted = array(mesh, count, 2, dtype=jnp.float32)
    condition = UNetCondition(array(mesh, count, 2, 77, 2048), added, wanted)
    scale = array(mesh, count, dtype=jnp.float32)
    x = array(mesh, count, 128, 128, 4, dtype=jnp.float32)
    shared = UNetShared(None, None, ())
    make = lambda weights, scale: UNetPredictor(weights, shared, jnp.dtype(BF16))
    guider = ClassifierFree(jnp.float32(5))
    return weights, (condition, scale, x), one_step(make, guider, flow_schedule(20))


def vae(mesh, count):
    """The autoencoder of FLUX.1, from a latent to a picture of 2048x2048."""
    component = find_model("flux-dev")[0].components["vae"]
    widths = (128, 256, 512, 512)
    config = AutoencoderKLConfig(widths, latent_channels=16, layers_per_block=2)
    weights = sharded(component, config, mesh)
    return weights, (array(mesh, count, 256, 256, 16),), lambda vae, index, z: vae.decode(z)


def one_step(make, guider, schedule):
    def one(weights, index, condition, scale, x):
        denoiser = GuidedDenoiser(make(weights, scale), condition, guider, Flow())
        return step(denoiser, x, State(None, None), schedule, index, Euler())[0]

    return one


MODELS = {"flux-dev": (flux, 28), "sdxl": (sdxl, 20), "vae-2048": (vae, 1)}


def array(mesh, count, *shape, dtype=BF16):
    place = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=place)


def sharded(component, config, mesh):
    """Returns the skeleton of a network with the sharding of each leaf."""
    skeleton = component.skeleton(config, BF16)
    places = {
        path: parameter_sharding(path, leaf.shape, component.rules, mesh)
        for path, leaf in leaf_paths(skeleton).items()
    }
    places = iter(places.values())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=next(places)), skeleton
    )


def compiled(model, chip, shape, sizes):
    more = {"chips_per_host_bounds": [1, 1, 1]} if shape == "1x1" else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{shape}", **more)
    mesh = make_mesh(**sizes, devices=topology.devices)
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    weights, inputs, one = MODELS[model][0](mesh, count)
    arrays, static = eqx.partition(weights, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def run(arrays, inputs, index):
        weights = eqx.combine(arrays, static)
        each = lambda *inputs: one(weights, index, *inputs)
        with on_mesh(mesh):
            return jax.vmap(each, spmd_axis_name=BATCH_AXES)(*inputs)

    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with mock.patch("eqxdiff.kernels.attention._attend", stand_in):
        lowered = jax.jit(run).lower(arrays, inputs, index)
    return lowered.compile(), count


SIZES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1}


def size_of(text):
    """Counts the bytes of all shapes in a piece of HLO."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", text)
    count = lambda dims: math.prod(int(n) for n in dims.split(",") if n)
    return sum(SIZES.get(kind, 0) * count(dims) for kind, dims in found)


def received(kind, line, result, devices):
    """Estimates the bytes that each device receives in one transfer."""
    groups = re.search(r"replica_groups=\[\d+,(\d+)\]|replica_groups=\{\{([\d,]*)\}", line)
    n = devices
    if groups:
        n = int(groups[1]) if groups[1] else len(groups[2].split(","))
    share = (n - 1) / n
    if kind == "all-gather":
        return result * share
    if kind == "all-reduce":
        return 2 * result * share
    if kind == "reduce-scatter":
        return result * (n - 1)
    return result * share if kind == "all-to-all" else result


def counted(text, devices):
    """Sums cycles, and bytes received by kind of transfer, of a program with its loops."""
    computations, name = {}, None
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.rstrip().endswith("{"):
            name = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
            computations[name] = []
        elif name is not None:
            computations[name].append(line)

    def total(name, seen=()):
        cycles, moved = 0, {}
        for line in computations.get(name, ()):
            times, inner = 1, None
            if " while(" in line:
                # A scan counts up to a constant of its condition.
                condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
                limits = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
                times = max(map(int, limits), default=1)
                inner = re.search(r"body=%?([\w.\-]+)", line)[1]
            elif call := re.search(
                r" (?:call|async-start)\(.*?(?:to_apply|calls)=%?([\w.\-]+)", line
            ):
                inner = call[1]
            if estimate := re.search(r'"?estimated_cycles"?:"(\d+)"', line):
                cycles += int(estimate[1])
            if inner is not None and inner not in seen:
                own, bytes_ = total(inner, (*seen, name))
                cycles += times * own
                for kind, count in bytes_.items():
                    moved[kind] = moved.get(kind, 0) + times * count
            kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
            match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
            if match:
                result = size_of(match[1])
                if match[3] and match[2] in ("all-gather", "collective-permute"):
                    parts = re.findall(r"\w+\[[\d,]*\]", match[1])
                    result = (
                        max(map(size_of, parts)) if match[2] == "all-gather" else size_of(parts[0])
                    )
                count = received(match[2], line, result, devices)
                moved[match[2]] = moved.get(match[2], 0) + count
        return cycles, moved

    return total("ENTRY")


def attention_ms(model, chip, sizes, count):
    """Estimates the time of attention on one device, for its pictures."""
    peak = CHIPS[chip][0] * 1e9
    shapes = {  # queries, keys, heads, features of a head, times a step
        "flux-dev": [(4608, 4608, 24, 128, 57)],
        "sdxl": [
            *((queries, keys, 10, 64, 10) for queries, keys in ((4096, 4096), (4096, 128))),
            *((queries, keys, 20, 64, 60) for queries, keys in ((1024, 1024), (1024, 128))),
        ],
        "vae-2048": [(65536, 65536, 1, 512, 1)],
    }[model]
    ways = sizes.get("context", 1) * sizes.get("tensor", 1)
    each = count / (sizes.get("data", 1) * sizes.get("fsdp", 1)) * (2 if model == "sdxl" else 1)
    seconds = 0.0
    for queries, keys, heads, dim, times in shapes:
        local = max(1, heads // sizes.get("tensor", 1))
        if context_form(queries, keys, local, sizes.get("context", 1)) == "ring":
            continue  # a part of the compiled program
        efficiency = EFFICIENCY[chip][0 if dim == 128 else 1]
        padded = math.ceil(heads / ways) * ways
        seconds += times * each * 4 * queries * keys * padded * dim / (peak * efficiency) / ways
    return seconds


def measure(model, chip, shape, way):
    sizes = MESHES[shape][way]
    began = time.perf_counter()
    row = {"model": model, "chip": chip, "shape": shape, "way": way, "mesh": sizes}
    try:
        program, count = compiled(model, chip, shape, sizes)
    except jax.errors.JaxRuntimeError as error:
        short = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm", str(error))
        return {**row, "error": short[0] if short else str(error)[:200]}
    devices = math.prod(sizes.values())
    memory, text = program.memory_analysis(), program.as_text()
    cycles, moved = counted(text, devices)
    _, clock, room, links = CHIPS[chip]
    attend = attention_ms(model, chip, sizes, count)
    compute, transfer = cycles / clock / 1e6, sum(moved.values()) / links / 1e6
    steps = MODELS[model][1]
    return {
        **row,
        "pictures": count,
        "arguments_GiB": round(memory.argument_size_in_bytes / 2**30, 2),
        "temporary_GiB": round(memory.temp_size_in_bytes / 2**30, 2),
        "room_GiB": room,
        "received_MB": {kind: round(count / 1e6, 1) for kind, count in moved.items()},
        "operations_ms": round(compute, 1),
        "attention_ms": round(attend, 1),
        "transfers_ms": round(transfer, 1),
        "all_steps_s": [
            round((compute + attend) * steps / 1e3, 2),
            round((compute + attend + transfer) * steps / 1e3, 2),
        ],
        "compile_s": round(time.perf_counter() - began),
    }


def table(path):
    """Prints the rows of a file as Markdown."""
    heads = ["model", "chips", "mesh", "pictures", "memory", "received", "operations"]
    print("|".join(["", *heads, "attention", "transfers", "all steps", ""]))
    print("|" + "---|" * 10)
    for row in map(json.loads, path.read_text().splitlines()):
        devices = math.prod(row["mesh"].values())
        start = [row["model"], f"{row['chip']}-{devices}", row["way"]]
        if "error" in row:
            print("|".join(["", *start, f"does not fit: {row['error']}", *[""] * 6, ""]))
            continue
        moved = sum(row["received_MB"].values())
        low, high = row["all_steps_s"]
        cells = [
            *start,
            str(row["pictures"]),
            f"{row['arguments_GiB']} + {row['temporary_GiB']} of {row['room_GiB']} GiB",
            f"{moved:.0f} MB",
            *(f"{row[name]} ms" for name in ("operations_ms", "attention_ms", "transfers_ms")),
            f"{low} to {high} s",
        ]
        print("|".join(["", *cells, ""]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="MODEL:CHIP:SHAPE:WAY")
    parser.add_argument("--output", type=Path, default=Path("tpu_scaling.jsonl"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table is not None:
        table(args.table)
        return
    chips = [("v6e", "1x1"), ("v6e", "2x2"), ("v6e", "2x4"), ("v5e", "2x2"), ("v5e", "2x4")]
    wanted = args.only or [
        f"{model}:{chip}:{shape}:{way}"
        for model in MODELS
        for chip, shape in chips
        for way in MESHES[shape]
    ]
    for name in wanted:
        row = measure(*name.split(":", 1)[:1], *name.split(":")[1:])
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
