"""Compares the memory that `eqxdiff plan` foretells with that of a real load and a real run.

    python benchmarks/plan_against_run.py [--width 1024] [--size 512] [--write]

It makes a model of FLUX.1's architecture of random weights, of about a gigabyte by default, and
loads it, or makes a picture, in a process of its own, whose peak resident memory it asks for.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from eqxdiff.checkpoint import read_table, save_module
from eqxdiff.convert.example import randomised, write_example
from eqxdiff.models import find_model
from eqxdiff.pipeline import open_model
from eqxdiff.plan import Skeletons, Wish, look_ahead
from eqxdiff.plan.targets import CPU_LIBRARIES


MODEL = "flux-dev"
RESULTS = Path(__file__).parent / "results" / "plan_against_run.json"

PEAK = """
import resource, sys
import eqxdiff
folder, size = sys.argv[1], int(sys.argv[2])
pipe = eqxdiff.load("flux-dev", folder)
if size:
    eqxdiff.generate(pipe, "a cat", steps=2, width=size, height=size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_model(folder: Path, width: int) -> None:
    """Writes a model of random weights whose transformer is so many numbers wide."""
    write_example(MODEL, folder)
    changes = {
        "transformer": {
            "attention_head_dim": 64,
            "axes_dims_rope": [16, 24, 24],
            "num_attention_heads": width // 64,
            "num_layers": 3,
            "num_single_layers": 6,
        },
        "vae": {"block_out_channels": [32, 64, 128, 128], "norm_num_groups": 32},
    }
    family, _ = find_model(MODEL)
    for name, change in changes.items():
        file = folder / name / "config.json"
        fields = {**json.loads(file.read_text()), **change}
        file.write_text(json.dumps(fields))
        component = family.components[name]
        skeleton = component.skeleton(component.parse(fields))
        module = randomised(skeleton, component.rules, np.random.default_rng(0))
        for old in (folder / name).glob("*.safetensors"):
            old.unlink()
        save_module(
            module, read_table(component.table), folder / name, stem="diffusion_pytorch_model"
        )


def real_peak(folder: Path, size: int) -> int:
    """Returns the peak memory of a process that loads the model, and makes a picture if `size`."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(size)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return int(done.stdout.split()[-1])


def compare(width: int, size: int) -> dict:
    """Returns the bytes of a load and of a run, foretold and real."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_model(path, width)
        settings = {"steps": 2, "width": size, "height": size}
        plan, _ = look_ahead(Wish(MODEL, settings, target="cpu", weights=str(path)))
        # While a tensor is on its way to the device the next one is read.
        leaves = jax.tree.leaves(dict(Skeletons.of(open_model(MODEL, str(path))).modules))
        largest = max(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        load = CPU_LIBRARIES + sum(one.device for one in plan.components) + largest
        facts = {}
        for name, told, real in (
            ("load", load, real_peak(path, 0)),
            ("run", plan.peak, real_peak(path, size)),
        ):
            facts[name] = {"plan": round(told), "real": real, "ratio": round(told / real, 3)}
    return {"weights": sum(one.nbytes for one in plan.components), "size": size, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    facts = compare(given.width, given.size)
    print(json.dumps(facts))
    if given.write:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        known = {"machine": platform.machine(), "versions": versions, **facts}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
