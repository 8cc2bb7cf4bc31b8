"""Time of loading a checkpoint into JAX arrays, over that of PyTorch, in one run, cache warm.

Makes a checkpoint of 5 GB in bfloat16 (half the layers of FLUX.1, about), reads it once so that the
system has it in memory, and loads it in turn, each time in a process of its own:

- here, with `load_module`, which also checks that every number is finite;
- with `safetensors.torch.load_file` and a copy of every tensor, as `load_file` alone maps the file
  and reads nothing.

Each is run twice in a row and the second counts: memory that a virtual machine has not touched
before is slow to get, and each touches other memory, in pages of another size.

Shown are the shortest and the middle time of each, their ratios, and the growth of the peak
resident memory over the bytes of the parameters.

    python benchmarks/load_speed.py [--json] [--layers 50] [--repeat 5] [--folder DIR]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import load_memory


def peer(path: Path) -> dict[str, float]:
    """Loads with PyTorch in this process."""
    from safetensors.torch import load_file

    Path("/proc/self/clear_refs").write_text("5")
    before = load_memory.status("VmRSS")
    begin = time.perf_counter()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    seconds = time.perf_counter() - begin
    size = sum(tensor.nbytes for tensor in tensors.values())
    peak = load_memory.status("VmHWM") - before
    return {"seconds": seconds, "peak_over_parameters": peak / size}


def measure(kind: str, path: Path, layers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--layers", str(layers), "--load", kind, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def warm(path: Path) -> None:
    """Reads the file, so that no run waits for the disk."""
    with open(path, "rb", buffering=0) as file:
        while file.read(64 << 20):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--layers", type=int, default=50, help="of 0.1 GB each")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made, and removed")
    parser.add_argument("--load", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        kind, path = args.load[0], Path(args.load[1])
        here = kind == "eqxdiff"
        print(json.dumps(load_memory.load(path, args.layers, "bfloat16") if here else peer(path)))
        return
    runs: dict[str, list[dict[str, float]]] = {"eqxdiff": [], "torch": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "model.safetensors"
        load_memory.make(path, args.layers)
        size = path.stat().st_size
        for turn in range(args.repeat):
            for kind in sorted(runs, reverse=turn % 2 == 1):
                warm(path)
                measure(kind, path, args.layers)
                runs[kind].append(measure(kind, path, args.layers))
    seconds = {kind: [run["seconds"] for run in each] for kind, each in runs.items()}
    results = {
        "jax": jax.__version__,
        "cpus": os.cpu_count(),
        "file_bytes": size,
        **{
            kind: {
                "seconds_min": min(seconds[kind]),
                "seconds_median": statistics.median(seconds[kind]),
                "peak_over_parameters": max(run["peak_over_parameters"] for run in each),
            }
            for kind, each in runs.items()
        },
        "ratio_min": min(seconds["eqxdiff"]) / min(seconds["torch"]),
        "ratio_median": statistics.median(seconds["eqxdiff"]) / statistics.median(seconds["torch"]),
    }
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(f"checkpoint: {size / 1e9:.2f} GB in bfloat16, {args.repeat} runs each")
    for kind in runs:
        r = results[kind]
        print(
            f"{kind}: {r['seconds_min']:.2f} s at best, {r['seconds_median']:.2f} s in the middle, "
            f"peak memory {r['peak_over_parameters']:.3f} times the parameters"
        )
    print(f"time over PyTorch's: {results['ratio_min']:.2f}, {results['ratio_median']:.2f}")


if __name__ == "__main__":
    main()
