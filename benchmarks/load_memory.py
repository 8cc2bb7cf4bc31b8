"""Peak memory and time of loading a checkpoint, over the size of the parameters as loaded.

Makes a checkpoint of 2.2 GB in bfloat16, of stacked blocks whose largest leaf is a third of it,
and loads it in a process of its own, as bfloat16 and as float32. The figure is the growth of the
peak resident memory since just before loading, over the bytes of the parameters: at most 1.1.

Each is done several times; shown are the largest peak and the shortest time, as memory that a
virtual machine has not touched before is slow to get.

    python benchmarks/load_memory.py [--json] [--layers 22] [--repeat 3] [--mesh AXES]

With `--mesh fsdp=4` the shards go to as many fake devices, all in the memory of this machine: the
peak over the parameters then says what the host holds beside the devices' shards, and the largest
share of one device is shown, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from eqxdiff.checkpoint import Table, export_infos, load_module
from eqxdiff.checkpoint.save import write_tensors
from eqxdiff.nn import MLP, Linear, gelu_tanh, stack
from eqxdiff.sharding import parameter_sharding, parse_mesh
from eqxdiff.tensors import SafetensorsFile


DIM = 2048
TABLE = Table.parse('stack = ["blocks"]')


class Block(eqx.Module):
    to_q: Linear
    to_k: Linear
    to_v: Linear
    to_out: Linear
    ff: MLP


class Net(eqx.Module):
    proj_in: Linear
    blocks: Block

    @classmethod
    def init(cls, layers: int, dtype):
        def block(key):
            linear = lambda: Linear.init(DIM, DIM, key=key, dtype=dtype)
            ff = MLP.init(DIM, 4 * DIM, activation=gelu_tanh, key=key, dtype=dtype)
            return Block(linear(), linear(), linear(), linear(), ff)

        key = jax.random.key(0)
        return cls(Linear.init(64, DIM, key=key, dtype=dtype), stack(block, layers, key=key))


def make(path: Path, layers: int) -> None:
    """Random numbers, made once and repeated, written one tensor at a time."""
    infos = export_infos(eqx.filter_eval_shape(lambda: Net.init(layers, jnp.bfloat16)), TABLE)
    noise = np.random.RandomState(0).standard_normal(4 * DIM * DIM).astype(ml_dtypes.bfloat16)
    tensors = ((n, np.resize(noise, info.shape)) for n, info in infos.items())
    write_tensors(path, infos, tensors, {})


def status(field: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


RULES = (
    (r"proj_in\.weight", ("embed", None)),
    (r".*\.(to_[qkv]|proj_in)\.weight", ("hidden", "embed")),
    (r".*\.(to_out|proj_out)\.weight", ("embed", "hidden")),
    (r".*\.bias", (None,)),
)


def load(path: Path, layers: int, dtype: str, mesh: str) -> dict[str, float]:
    """Loads in this process, over the fake devices of a mesh where one is given."""
    skeleton = eqx.filter_eval_shape(lambda: Net.init(layers, jnp.bfloat16))
    jax.block_until_ready(jax.device_put(np.zeros(1), None))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    begin = time.perf_counter()
    place = None
    if mesh:
        devices = parse_mesh(mesh)
        place = lambda path, shape: parameter_sharding(path, shape, RULES, devices)
    net = load_module(SafetensorsFile(path), TABLE, skeleton, dtype=dtype, sharding=place)
    jax.block_until_ready(jax.tree_util.tree_leaves(net))
    seconds = time.perf_counter() - begin
    parameters = sum(
        leaf.nbytes for leaf in jax.tree_util.tree_leaves(eqx.filter(net, eqx.is_array))
    )
    held: dict[object, int] = {}
    for leaf in jax.tree_util.tree_leaves(eqx.filter(net, eqx.is_array)):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return {
        "parameters_bytes": parameters,
        "device_over_parameters": max(held.values()) / parameters,
        "devices_over_parameters": sum(held.values()) / parameters,
        "peak_bytes": status("VmHWM") - before,
        "peak_over_parameters": (status("VmHWM") - before) / parameters,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made, and removed")
    parser.add_argument("--mesh", default="", help="such as fsdp=4")
    parser.add_argument("--load", nargs=2, metavar=("FILE", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(Path(args.load[0]), args.layers, args.load[1], args.mesh)))
        return
    results = {}
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, **({"XLA_FLAGS": flags} if args.mesh else {})}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "model.safetensors"
        make(path, args.layers)
        size = path.stat().st_size
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, __file__, "--layers", str(args.layers)]
            command += ["--mesh", args.mesh, "--load", str(path), dtype]
            runs = []
            for _ in range(args.repeat):
                output = subprocess.run(
                    command, check=True, capture_output=True, text=True, env=env
                ).stdout
                runs.append(json.loads(output))
            worst = max(runs, key=lambda run: run["peak_bytes"])
            results[dtype] = {**worst, "seconds": min(run["seconds"] for run in runs)}
    if args.json:
        setting = {"jax": jax.__version__, "cpus": os.cpu_count(), "file_bytes": size}
        print(json.dumps({**setting, **results}, indent=2))
        return
    print(f"checkpoint: {size / 1e9:.2f} GB in bfloat16")
    for dtype, r in results.items():
        print(
            f"as {dtype}: {r['parameters_bytes'] / 1e9:.2f} GB of parameters, peak memory "
            f"{r['peak_over_parameters']:.3f} times that, {r['seconds']:.2f} s; "
            f"the largest share of a device {r['device_over_parameters']:.3f}"
        )


if __name__ == "__main__":
    main()
