"""Pictures of many prompts: jobs that share a file of prompts, and a Ray Data job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Cli, cli as cli, pixels

from eqxdiff import PromptError
from eqxdiff.bulk import parse_line, read_lines


GIVEN = ("--steps", "1", "--width", "64", "--height", "64")
LINES = [
    {"prompt": "a red heart", "seed": 3},
    {"prompt": "a blue star", "steps": 2},
    {"prompt": "a cat"},
    {"prompt": "a dog", "cfg": 2.0},
    {"prompt": "a house"},
]


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, LINES)) + "\n")
    return file


@pytest.fixture
def emoji(cli, prompts, tmp_path) -> Cli:
    words = ("generate", "flux-emoji", "--prompt-file", prompts, "-o", tmp_path / "out", *GIVEN)
    return lambda *more: cli(*words, *more)


def found(folder: Path) -> dict[str, int]:
    """The pictures in a folder, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_jobs_share_the_lines_and_a_rerun_makes_what_is_left(emoji, tmp_path, monkeypatch):
    """Names say the line and the content, so that nothing is lost, made twice or mistaken."""
    out = tmp_path / "out"
    assert emoji("--shard-of", 2, "--shard", 1).status == 0
    first = found(out)
    assert [name[:6] for name in sorted(first)] == ["000003", "000007"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "7")
    assert emoji("--shard-of", 2).status == 0
    every = found(out)
    assert [name[:6] for name in sorted(every)] == [f"00000{k}" for k in (1, 3, 5, 7, 9)]
    index = [json.loads(line) for line in (out / "index-0-of-2.jsonl").read_text().splitlines()]
    assert [(each["line"], each["seed"]) for each in index] == [(1, 3), (5, 5), (9, 9)]
    assert all((out / each["file"]).exists() for each in index)
    gone = out / index[1]["file"]
    wanted = pixels(gone)
    gone.unlink()
    again = emoji("--shard-of", 1, "--shard", 0, "--json")
    assert [Path(file).name for file in again.json["files"]] == [gone.name]
    assert (pixels(gone) == wanted).all()
    assert {name: when for name, when in found(out).items() if name != gone.name} == {
        name: when for name, when in every.items() if name != gone.name
    }
    assert {**first, **every} == every
    changed = emoji("--shard-of", 5, "--shard", 2, "--steps", 2, "--json")
    assert len(changed.json["files"]) == 1
    assert len(found(out)) == 6
    assert not list(out.glob(".*"))


def test_lines_have_settings_of_their_own(cli, prompts, tmp_path):
    """Without sharing, too: a line's own seed and settings come before those of the options."""
    words = ("generate", "flux-emoji", "--prompt-file", prompts, "-o", tmp_path / "a-{index}.png")
    made = cli(*words, *GIVEN, "--seed", 9, "--json")
    assert made.json["seeds"] == [3, 9, 9, 9, 9]
    one = cli("generate", "flux-emoji", "-p", "a dog", *GIVEN, "--cfg", "2", "--seed", 9, "-o",
              tmp_path / "b.png")  # fmt: skip
    assert one.status == 0
    assert abs(pixels(tmp_path / "a-3.png") - pixels(tmp_path / "b.png")).max() <= 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON object"),
        ("[1]", "line 2 is no JSON object with a prompt"),
        ("{}", "line 2 has no prompt that is a text"),
        ('{"prompt": "a", "seed": -1}', "line 2: the seed -1 is no number from 0"),
        ('{"prompt": "a", "seed": true}', "line 2: the seed True is no number"),
        ('{"prompt": "a", "steps": 0}', "line 2: steps 0 is out of range"),
        ('{"prompt": "a", "step": 1}', "line 2: flux-emoji would ignore step. Did you mean steps"),
    ],
)
def test_the_error_of_a_line_names_it(emoji, prompts, line, message):
    prompts.write_text(f'{{"prompt": "a cat"}}\n{line}\n')
    assert message in emoji("--shard-of", 1, "--shard", 0).error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard-of", 2, "--shard", 2], "--shard 2 is out of range: it is from 0 to 1"),
        (["--shard", 0], "--shard would be ignored without --shard-of"),
        (["--shard-of", 2], "--shard-of needs the number of this job: give --shard"),
        (["--shard-of", 2, "--shard", 0, "-p", "a cat"], "give a file of prompts"),
        (["--shard-of", 2, "--shard", 0, "-o", "a.png"], "--shard-of needs a folder"),
        (["--shard-of", 2, "--shard", 0, "--save-latents", "a.npy"], "--save-latents is for one"),
        (["--mesh", "data=2", "--process-id", 0], "--process-id would be ignored without"),
    ],
)
def test_what_does_not_go_together_is_an_error(emoji, words, message):
    assert message in emoji(*words).error


def test_a_scheduler_may_give_a_number_that_is_too_large(emoji, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    assert "JOB_COMPLETION_INDEX makes this job 2 of --shard-of 2" in emoji("--shard-of", 2).error


def test_a_job_without_a_line_ends_well(emoji, tmp_path):
    assert emoji("--shard-of", 9, "--shard", 8).status == 0


def test_rows_are_checked():
    assert read_lines('\n{"prompt": "a", "steps": 2}', "x")[0].settings == {"steps": 2}
    with pytest.raises(PromptError, match="x, row 3"):
        parse_line({"text": "a"}, 3, "x, row 3")


@pytest.mark.slow
def test_a_ray_job_outlives_its_workers(tmp_path):
    """A worker is killed amid its rows: each picture is made once, and the index has all."""
    pytest.importorskip("ray")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": each["prompt"], "seed": each.get("seed"), "steps": None} for each in LINES * 2
    ]
    rows.append({"prompt": "a bad row", "seed": None, "steps": 0})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    out = tmp_path / "out"
    out.mkdir()

    def job() -> subprocess.Popen:
        program = Path(sys.executable).with_name("eqxdiff")
        settings = ["--set", "steps=1", "--set", "width=64", "--set", "height=64"]
        files = ["--prompts", tmp_path / "prompts.parquet", "-o", out]
        environ = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        environ |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "RAY_AUTH_MODE": "disabled"}
        return subprocess.Popen(
            [program, "bulk", "flux-emoji", *files, *settings],
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    run, until = job(), time.monotonic() + 120
    while len(found(out)) < 2:
        assert run.poll() is None, run.communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.005)
    killed = painters(tmp_path / "cache")
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    before = found(out)
    printed, err = run.communicate(timeout=180)
    assert (run.returncode, printed) == (1, ""), err[-3000:]
    assert "error: prompts.parquet, row 11: steps 0 is out of range" in err
    assert killed
    assert len(before) < 10
    made = parquet.read_table(out / "index.parquet").to_pylist()
    assert [row["line"] for row in made] == list(range(1, 11))
    assert [row["seed"] for row in made[:3]] == [3, 2, 3]
    every = found(out)
    assert sorted(every) == sorted(row["file"] for row in made)
    assert {name: every[name] for name in before} == before


def painters(cache: Path) -> list[int]:
    """The actors of Ray that keep their compiled programs in a folder."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environ = ((folder / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if command.startswith(b"ray::") and b"Painter" in command and bytes(cache) in environ:
            pids.append(int(folder.name))
    return pids
