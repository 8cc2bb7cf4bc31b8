"""Real processes: Ctrl-C and SIGTERM at any moment, and standard streams that cannot be written."""

import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


COUNT = 200
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# A shell's background job is told to ignore SIGINT, and so would be what it starts.
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
RUN = "import sys; from eqxdiff.cli import main; sys.exit(main())"
ORDER = ("generate", "flux-emoji", "-p", "an owl on pink", "--steps", "300", "-o", "new/x.png")


def start(folder: Path, cache: Path, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HEED + RUN, *argv],
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def serves(run: subprocess.Popen) -> bool:
    """Tells whether the process has a handler for SIGTERM, from Linux's own record."""
    status = Path(f"/proc/{run.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_first_signal_always_ends_the_program(tmp_path):
    """200 signals at random moments from the program's first line on; a run takes two seconds."""
    cache, moments = tmp_path / "cache", random.Random(0)
    with start(tmp_path, cache, *ORDER[:-3], "2", "-o", "warm.png") as warm:
        assert warm.communicate(timeout=120)[0] == "warm.png\n"

    def one(index: int) -> str | None:
        folder = tmp_path / str(index)
        folder.mkdir()
        number = (signal.SIGINT, signal.SIGTERM)[index // 2 % 2]
        delay = moments.uniform(0, 2.0 if index % 2 else 0.4)
        with start(folder, cache, *ORDER) as run:
            while not serves(run):
                pass
            try:
                out, err = run.communicate(timeout=delay)
            except subprocess.TimeoutExpired:
                run.send_signal(number)
                out, err = run.communicate(timeout=60)
        left = [path.name for path in folder.rglob("*")]
        right = run.returncode == STATUS[number] and err.endswith(("ted.\n", "is complete.\n"))
        if "new/x.png" in out or "x.png" in left:  # it came too late
            Image.open(folder / "new/x.png").load()
            right = left == ["new", "x.png"]
        elif left:
            right = False
        if right and "Traceback" not in err and "rror:" not in err.replace("error: ", "", 1):
            return None
        return f"{number!r} after {delay:.3f} s: {run.returncode}, {left}, {out!r}, {err!r}"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        wrong = [text for text in pool.map(one, range(COUNT)) if text]
    assert not wrong, "\n".join(wrong)


def test_a_signal_says_what_is_complete(tmp_path):
    order = [*ORDER[:4], "--num-images", "50", "--steps", "1", "--json", "-o", "{index}.png"]
    with start(tmp_path, tmp_path / "cache", *order) as run:
        for line in run.stderr:
            if json.loads(line)["event"] == "file":
                break
        run.send_signal(signal.SIGINT)
        last = json.loads(run.communicate()[1].splitlines()[-1])
    assert run.returncode == 130
    assert last["event"] == "error"
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert "complete." in last["message"]
    assert any(name in last["message"] for name in pictures)
    assert not list(tmp_path.glob(".eqxdiff*"))


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "2>/dev/full"])
def test_a_picture_is_made_whatever_the_streams_are(tmp_path, redirection):
    order = f"{sys.executable} -m eqxdiff generate flux-emoji -p 'owl on pink' --steps 1 -o x.png"
    done = subprocess.run(
        f"{order} {redirection}", shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    Image.open(tmp_path / "x.png").load()


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "eqxdiff", "-V"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("eqxdiff ")
