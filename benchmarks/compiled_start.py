"""Times `eqxdiff generate` with and without `--compiled`, each in a new process with a warm cache.

    python benchmarks/compiled_start.py [--write]

The model is a tiny random SDXL, whose UNet has fewer layers to trace than the real one;
the difference is tracing, which compiled programs need not do.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from eqxdiff.convert.example import write_example


RESULTS = Path(__file__).parent / "results" / "compiled_start.json"
PROGRAM = (
    "import sys; from importlib.metadata import entry_points as e; "
    "sys.exit([*e(group='console_scripts', name='eqxdiff')][0].load()())"
)


def run(folder: Path, *words: str) -> float:
    """Runs a command line in a process of its own, and returns the seconds that it took."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    began = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, *words]
    subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=True)
    return time.perf_counter() - began


def compare(times: int = 3) -> dict:
    """Returns the seconds of the fastest of some starts of each kind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_example("sdxl", folder / "model")
        own = ("sdxl", "--weights", "model", "--width", "64", "--height", "64", "--steps", "2")
        run(folder, "compile", *own, "-o", "programs.eqx")
        words = ("generate", *own, "-p", "a cat", "-s", "1", "--overwrite")
        kinds = {"traced": (), "compiled": ("--compiled", "programs.eqx")}
        for more in kinds.values():
            run(folder, *words, *more)
        seconds = {kind: [] for kind in kinds}
        for _ in range(times):
            for kind, more in kinds.items():
                seconds[kind].append(run(folder, *words, *more))
        return {kind: round(min(each), 2) for kind, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    facts = {"model": "tiny sdxl, 64x64, 2 steps", "seconds": compare()}
    facts["jax"] = importlib.metadata.version("jax")
    facts["machine"] = "two cores of an x86-64 server"
    print(json.dumps(facts))
    if parser.parse_args().write:
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
