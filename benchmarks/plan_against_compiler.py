"""Compares the formula of `eqxdiff plan` with what the compiler for TPUs says, for eight programs.

    pip install libtpu==0.0.42.1
    python benchmarks/plan_against_compiler.py [CASE ...]

It compiles programs of full size for TPUs that need not exist, with bfloat16 weights: some take
minutes. The results go to `benchmarks/results/plan_against_compiler.json`, one case at a time.
"""

import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path

from eqxdiff.plan import Choice, Skeletons, find_target, make_plan
from eqxdiff.plan.ahead import measure


RESULTS = Path(__file__).parent / "results" / "plan_against_compiler.json"

SMALL = {"width": 256, "height": 256}
CASES = {
    "flux-dev text, v6e-1": ("flux-dev", "encode", "v6e-1", {}, {}),
    "flux-dev text, v6e-4 fsdp=4": ("flux-dev", "encode", "v6e-4", {"fsdp": 4}, {}),
    "sdxl text, v5e-1": ("sdxl", "encode", "v5e-1", {}, {}),
    "flux-dev step at 1024, v6e-1": ("flux-dev", "step", "v6e-1", {}, {}),
    "flux-dev step at 256, v6e-4 fsdp=4": ("flux-dev", "step", "v6e-4", {"fsdp": 4}, SMALL),
    "flux-dev step at 256, v6e-4 tensor=4": ("flux-dev", "step", "v6e-4", {"tensor": 4}, SMALL),
    "flux-schnell step at 256, v5p-8 tensor=4": (
        "flux-schnell",
        "step",
        "v5p-8",
        {"tensor": 4},
        SMALL,
    ),
    "sd21-base step at 256, v5e-1": ("sd21-base", "step", "v5e-1", {}, SMALL),
}
"""The model, its program, the target, the mesh and the settings."""


def compare(name: str) -> dict:
    """Returns the figures of a case by formula and by the compiler."""
    model, program, wanted, mesh, settings = CASES[name]
    target = find_target(wanted)
    skeletons = Skeletons.published(model, dtype="bfloat16", compute_dtype="bfloat16")
    choice = Choice(settings, None, mesh)
    ours = make_plan(skeletons, target, choice).program(program)
    began = time.perf_counter()
    found = measure(skeletons, target, choice, [program])[program]
    seconds = time.perf_counter() - began
    peak = ours.arguments + ours.temporary
    real = found.arguments + found.temporary + found.results
    return {
        "arguments": {"formula": ours.arguments, "compiler": found.arguments},
        "temporary": {"formula": ours.temporary, "compiler": found.temporary + found.results},
        "peak": {"formula": peak, "compiler": real, "ratio": round(peak / real, 4)},
        "collectives": {"formula": round(ours.collective), "compiler": found.collectives},
        "compile_seconds": round(seconds),
    }


def main() -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    known["versions"] = {n: importlib.metadata.version(n) for n in ("jax", "libtpu")}
    known["machine"] = f"{platform.machine()}, no TPU"
    for name in sys.argv[1:] or CASES:
        known["cases"][name] = compare(name)
        print(name, json.dumps(known["cases"][name]), flush=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
