"""Times a picture of flux-emoji from the start of the process, with an empty and a full cache.

python benchmarks/emoji_first_picture.py [--weights FOLDER --model flux-schnell]
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path


RUNS = 3


def seconds(cache: Path, output: Path, arguments: list[str]) -> float:
    """Measures the wall time of one command that keeps its programs in `cache`."""
    command = ["eqxdiff", "generate", *arguments, "--prompt", "a red apple on a yellow background"]
    command += ["--seed", "0", "--output", str(output / "apple.png"), "--overwrite", "--quiet"]
    began = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)})
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="flux-emoji")
    parser.add_argument("--weights", help="a folder of other weights")
    options = parser.parse_args()
    arguments = [options.model]
    if options.weights is not None:
        arguments += ["--weights", options.weights, "--width", "64", "--height", "64"]
        arguments += ["--steps", "20", "--cfg", "3", "--max-sequence-length", "20"]
    cold, warm = [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            cold.append(seconds(path / "cache", path, arguments))
            warm.append(seconds(path / "cache", path, arguments))
    median = lambda values: round(sorted(values)[RUNS // 2], 2)
    print(json.dumps({"cores": os.cpu_count(), "cold": median(cold), "warm": median(warm)}))


if __name__ == "__main__":
    main()
