"""Peak memory and time of loading a checkpoint with a LoRA, over those of loading it without.

Makes the checkpoint of `load_memory.py` and a LoRA of rank 64 for every matrix of its blocks, and
loads the checkpoint in a process of its own: plain, with the LoRA, and with the same LoRA as a
DoRA. The peak counts the LoRA itself: it is read after the measurement has begun. The growth of
the peak resident memory with a LoRA is to be at most 1.05 times that without.

    python benchmarks/lora_memory.py [--json] [--layers 22] [--repeat 3] [--folder DIR]
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
from load_memory import TABLE, Net, make, status

from eqxdiff.checkpoint import export_infos, load_module
from eqxdiff.checkpoint.save import write_tensors
from eqxdiff.lora import Merger, fit, load as load_adapter
from eqxdiff.tensors import SafetensorsFile, TensorInfo


RANK = 64
KINDS = ("plain", "lora", "dora")


def skeleton(layers: int) -> Net:
    return eqx.filter_eval_shape(lambda: Net.init(layers, jnp.bfloat16))


def make_adapter(path: Path, layers: int, kind: str) -> None:
    """A LoRA for every matrix of the blocks; a DoRA has a magnitude for each row too."""
    infos = {}
    for name, info in export_infos(skeleton(layers), TABLE).items():
        stem, _, last = name.rpartition(".")
        if stem.startswith("blocks.") and last == "weight":
            rows, columns = info.shape
            shapes: dict[str, tuple[int, ...]]
            shapes = {"lora_A.weight": (RANK, columns), "lora_B.weight": (rows, RANK)}
            if kind == "dora":
                shapes["lora_magnitude_vector"] = (rows,)
            for ending, shape in shapes.items():
                infos[f"{stem}.{ending}"] = TensorInfo(shape, np.dtype(ml_dtypes.bfloat16))
    noise = np.random.RandomState(1).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
    write_tensors(path, infos, ((n, np.resize(noise, i.shape)) for n, i in infos.items()), {})


def load(path: Path, adapter: Path | None, layers: int) -> dict[str, float]:
    """Loads in this process."""
    net = skeleton(layers)
    jax.block_until_ready(jax.device_put(np.zeros(1), None))
    _ = np.ones((512, 512), np.float32) @ np.ones((512, 512), np.float32)  # starts its threads
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    begin = time.perf_counter()
    change = None
    if adapter is not None:
        fitted = fit(net, load_adapter(str(adapter)), tables=[TABLE])
        change = Merger(fitted, "model").change
    loaded = load_module(SafetensorsFile(path), TABLE, net, change=change)
    jax.block_until_ready(jax.tree.leaves(loaded))
    return {"peak_bytes": status("VmHWM") - before, "seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed")
    parser.add_argument("--load", nargs=2, metavar=("FILE", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        path = Path(args.load[0])
        adapter = None if args.load[1] == "plain" else path.with_name(f"{args.load[1]}.safetensors")
        print(json.dumps(load(path, adapter, args.layers)))
        return
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "model.safetensors"
        make(path, args.layers)
        size = path.stat().st_size
        for kind in KINDS:
            if kind != "plain":
                make_adapter(path.with_name(f"{kind}.safetensors"), args.layers, kind)
            command = [sys.executable, __file__, "--layers", str(args.layers)]
            command += ["--load", str(path), kind]
            runs = []
            for _ in range(args.repeat):
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs.append(json.loads(output))
            peak = max(run["peak_bytes"] for run in runs)
            results[kind] = {
                "peak_bytes": peak,
                "peak_over_plain": peak / results.get("plain", {"peak_bytes": peak})["peak_bytes"],
                "seconds": min(run["seconds"] for run in runs),
            }
    if args.json:
        setting = {"jax": jax.__version__, "cpus": os.cpu_count(), "file_bytes": size}
        print(json.dumps({**setting, "rank": RANK, **results}, indent=2))
        return
    for kind, r in results.items():
        print(
            f"{kind}: peak {r['peak_bytes'] / 1e9:.2f} GB, {r['peak_over_plain']:.3f} times plain, "
            f"{r['seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
