"""The command line does what it says; `test_cli_errors` has what it refuses."""

import ast
import importlib
import io
import json
import shlex
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
from command import SMALL, cli as cli, dev as dev, generate as generate, pixels
from safetensors.numpy import load_file, save_file

import eqxdiff
from eqxdiff.checkpoint import load_module
from eqxdiff.pipeline import initial_noise
from eqxdiff.pipeline.stages import Parked


SHAPE = (4, 8, 8)
"""Of the tiny model's latents at 64x64."""


def test_a_prompt_becomes_a_picture(generate):
    """The file is named on stdout; what it took is told on stderr, each on its own line."""
    run = generate("--prompt", "a cat", "--seed", 7)
    assert run.status == 0
    assert run.out == "flux-dev-7-0.png\n"
    assert pixels("flux-dev-7-0.png").shape == (64, 64, 3)
    assert pixels("flux-dev-7-0.png").std() > 1
    lines = run.err.splitlines()
    assert "sampling: 2 of 2" in lines
    assert [line.split(":")[0] for line in lines[-3:]] == [
        "load time",
        "compile time",
        "seconds an image",
    ]


def test_images_of_a_prompt_have_consecutive_seeds(generate):
    both = generate("-p", "a cat", "-p", "a dog", "--num-images", 2, "-s", 3, "--json")
    assert [(each["prompt"], each["seed"]) for each in both.json["images"]] == [
        ("a cat", 3),
        ("a cat", 4),
        ("a dog", 3),
        ("a dog", 4),
    ]
    images = [pixels(file) for file in both.json["files"]]
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])
    alone = generate("-p", "a dog", "-s", 4, "-o", "alone.png")
    assert (pixels(alone.files[0]) == images[3]).all()


def test_an_image_is_the_same_alone_and_in_any_batch(generate):
    """Four images in batches of three: the last is padded, and its image is none the worse."""
    arguments = ("-p", "a cat", "-p", "a dog", "--num-images", 2, "-s", 3)
    one = generate(*arguments, "-o", "one-{index}.png", "--save-latents", "one.npy")
    three = generate(
        *arguments, "-o", "b-{index}.png", "--batch-size", 3, "--save-latents", "b.npy"
    )
    assert [path.name for path in three.files] == [*(f"b-{i}.png" for i in range(4)), "b.npy"]
    np.testing.assert_allclose(np.load("b.npy"), np.load("one.npy"), atol=2e-5)
    for a, b in zip(one.files[:4], three.files[:4], strict=True):
        assert abs(pixels(a) - pixels(b)).max() <= 1


def test_the_noise_of_a_seed_is_the_same_bits_in_any_batch():
    seeds = [7, 2**32 - 1, 0, 8]
    together = np.asarray(initial_noise(seeds, SHAPE))
    for seed, noise in zip(seeds, together, strict=True):
        np.testing.assert_array_equal(initial_noise([seed], SHAPE)[0], noise)


def test_no_seed_is_a_random_seed_that_is_told(generate):
    runs = [generate("-p", "a cat") for _ in range(2)]
    one, other = (run.err.splitlines()[0].removeprefix("seed: ") for run in runs)
    assert one != other
    assert runs[0].files == [Path(f"flux-dev-{one}-0.png")]
    again = generate("-p", "a cat", "-s", one, "-o", "again.png")
    assert (pixels("again.png") == pixels(runs[0].files[0])).all()
    assert "seed: " not in again.err


def test_prompts_come_from_a_file(generate, monkeypatch):
    """One on each line, after those of the options; blank lines do not count, comments do."""
    text = "a cat\r\n\r\n  \n# a dog\n  two  blanks "
    Path("prompts.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    run = generate("-p", "first", "--prompt-file", "prompts.txt", "--steps", 1, "--json")
    prompts = [image["prompt"] for image in run.json["images"]]
    assert prompts == ["first", "a cat", "# a dog", "  two  blanks "]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a cat\nx\n")))
    run = generate("--prompt-file", "-", "--steps", 1, "--json")
    assert [image["prompt"] for image in run.json["images"]] == ["a cat", "x"]


def test_json_tells_what_was_done(generate, dev):
    run = generate("-p", "a cat", "-s", 5, "-g", 2, "--json")
    told = run.json
    assert told["files"] == ["flux-dev-5-0.png"]
    assert told["seeds"] == [5]
    assert told["settings"] == {
        "steps": 2,
        "width": 64,
        "height": 64,
        "guidance": 2.0,
        "max_sequence_length": 512,
    }
    assert told["weights"]["folder"] == dev.name
    assert told["latents"] is None
    assert set(told["timings"]) == {
        "load_seconds",
        "encode_seconds",
        "compile_seconds",
        "seconds_per_image",
    }
    assert all(seconds >= 0 for seconds in told["timings"].values())
    steps = [event for event in run.events if event.get("what") == "sampling"]
    assert [(event["done"], event["total"]) for event in steps] == [(0, 2), (1, 2), (2, 2)]
    assert {"event": "file", "path": "flux-dev-5-0.png"} in run.events


def test_quiet_prints_files_alone(generate):
    run = generate("-p", "a cat", "-o", "a.png", "--quiet")
    assert (run.out, run.err) == ("a.png\n", "")
    run = generate("-p", "a cat", "-o", "b.png", "--quiet", "--json")
    assert (run.json["files"], run.err) == (["b.png"], "")


def test_what_a_user_changes_compiles_nothing(generate):
    """Prompt, seed, guidance and schedule; another size does compile."""
    generate("-p", "a cat", "-s", 1, "--cfg", 2, "-n", "x")
    again = generate(
        *("-p", "a dog, at length", "-s", 2, "-g", 1.5, "--cfg", 3, "-n", "blurred", "--shift", 2),
        "--json",
    )
    assert again.json["compiled"]["programs"] == 0
    assert generate("-p", "a dog", "-W", 80, "--json").json["compiled"]["programs"] > 0


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_noise_in_and_latents_out(generate, suffix):
    """The noise of the seeds, given in a file, makes the pictures of the seeds."""
    noise = np.asarray(initial_noise([5, 6], SHAPE))
    np.save("n.npy", noise) if suffix == ".npy" else save_file({"any": noise}, "n.safetensors")
    seeds = generate("-p", "a cat", "-s", 5, "--num-images", 2, "--save-latents", f"a{suffix}")
    given = generate(
        *("-p", "a cat", "-s", 9, "--num-images", 2, "--noise", f"n{suffix}"),
        *("--save-latents", f"b{suffix}"),
    )
    assert given.files[-1] == Path(f"b{suffix}")
    a, b = (
        np.load(f"{name}.npy") if suffix == ".npy" else load_file(f"{name}.safetensors")["latents"]
        for name in "ab"
    )
    assert a.shape == (2, *SHAPE)
    assert a.dtype == np.float32
    np.testing.assert_array_equal(a, b)
    for one, other in zip(seeds.files[:2], given.files[:2], strict=True):
        assert (pixels(one) == pixels(other)).all()


def test_latents_of_one_run_are_noise_for_another_in_any_float(generate):
    np.save("n.npy", np.asarray(initial_noise([5], SHAPE), np.float64))
    generate("-p", "a cat", "-s", 5, "-o", "a.png")
    generate("-p", "a cat", "--noise", "n.npy", "-o", "b.png")
    assert (pixels("a.png") == pixels("b.png")).all()


@pytest.mark.parametrize("option", ["--offload", "--release"])
def test_encoders_out_of_the_way_make_the_same_pictures(generate, option):
    """Over two rounds of prompts, so that they must come back."""
    arguments = ("-p", "a", "-p", "b", "-s", 4)
    plain = generate(*arguments, "-o", "plain-{index}.png")
    other = generate(*arguments, "-o", "other-{index}.png", option, "text")
    for a, b in zip(plain.files, other.files, strict=True):
        assert (pixels(a) == pixels(b)).all()


def test_released_encoders_have_encoded_every_prompt_first(generate):
    run = generate("-p", "a", "-p", "b", "--release", "text", "--json", "--steps", 1)
    stages = [event["what"] for event in run.events if event["event"] == "progress"]
    assert stages.index("encoding") < stages.index("loading transformer")
    assert stages.count("encoding") == 1


def test_parked_modules_leave_the_device_and_come_back(dev):
    """As numpy arrays in between; and uncommitted as before, or all would be compiled anew."""
    modules = eqxdiff.open_model("flux-dev", str(dev)).load(["text_encoder"])
    parked = Parked(modules)
    back = parked.back()
    for before, after in zip(jax.tree.leaves(modules), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.committed == after.committed


def test_a_mesh_makes_the_same_picture(generate):
    """The weights and the batch are spread over eight devices."""
    arguments = ("-p", "a cat", "-s", 4, "--num-images", 4)
    one = generate(*arguments, "-o", "one-{index}.png")
    many = generate(*arguments, "-o", "many-{index}.png", "--mesh", "data=2,fsdp=2,tensor=2")
    for a, b in zip(one.files, many.files, strict=True):
        assert abs(pixels(a) - pixels(b)).max() <= 1


def test_the_attention_that_is_asked_for_runs_and_is_told(generate):
    """On the default device and over a mesh: every shape by blocks, and the same picture."""
    argv = ("-p", "a cat", "-s", 4, "--json", "--attention", "chunked")
    plain = generate("-p", "a cat", "-s", 4, "--json", "-o", "plain.png")
    small = generate(*argv, "--attention-blocks", "64,96", "-o", "small.png")
    mesh = generate(*argv, "-o", "mesh.png", "--mesh", "tensor=4")
    assert set(plain.json["attention"].values()) == {"xla"}
    assert small.json["attention"] == dict.fromkeys(plain.json["attention"], "chunked")
    assert set(mesh.json["attention"].values()) == {"chunked"}  # of shapes of one device
    for name in ("small.png", "mesh.png"):
        assert abs(pixels("plain.png") - pixels(name)).max() <= 1


def test_dtypes_are_as_asked(generate):
    generate("-p", "a cat", "-s", 4, "-o", "a.png")
    half = generate(
        *("-p", "a cat", "-s", 4, "-o", "b.png", "--json"),
        *("--dtype", "bfloat16", "--compute-dtype", "bfloat16"),
    )
    assert set(half.json["dtype"].values()) == {"bfloat16"}
    assert half.json["compute_dtype"] == "bfloat16"
    assert 0 < abs(pixels("a.png") - pixels("b.png")).mean() < 20


def test_a_prompt_that_is_cut_is_told_so(generate):
    """Before any weights are read, with what is lost and for which encoder."""
    words = "ab " * 100
    run = generate("-p", "short", "-p", words, "--steps", 1)
    (warning,) = [line for line in run.err.splitlines() if line.startswith("warning: ")]
    assert "prompt 2 is too long for text_encoder, which takes 77 tokens" in warning
    assert "ab ab" in warning
    assert run.err.index("warning") < run.err.index("loading")


def test_templates_name_the_files(generate):
    prompt = "Ein Käfer: groß & 1/2!"
    run = generate(
        "-p", prompt, "-s", 7, "-o", "new/{{{model}}}/{prompt:9}_{seed:05}_{index:2}.png"
    )
    (path,) = run.files
    assert path == Path("new/{flux-dev}/Ein-Käfer_00007_00.png")
    assert path.is_file()
    run = generate("-p", prompt, "-s", 8, "-o", "new")
    assert run.files == [Path("new/flux-dev-8-0.png")]
    run = generate("-p", "?!", "-o", "{prompt}.PNG")
    assert run.files == [Path("empty.PNG")]


def test_overwrite_replaces(generate):
    Path("a.png").write_text("old")
    assert generate("-p", "a cat", "-o", "a.png", "--overwrite").status == 0
    assert pixels("a.png").shape == (64, 64, 3)
    assert [path.name for path in Path().iterdir()] == ["a.png"]


def test_models_are_listed(cli):
    names = eqxdiff.model_names()
    lines = cli("models").out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(names)]] == names
    (takes,) = [i for i, line in enumerate(lines) if line.startswith("sdxl, ")]
    assert "crop" in lines[takes + 1]
    assert "canny" in lines[takes + 2]
    assert "black-forest-labs/FLUX.1-dev" in lines[1]
    assert "28 steps, 1024x1024, guidance 3.5, max sequence length 512" in lines[1]
    rows = cli("models", "--json").json
    assert [row["name"] for row in rows] == names
    assert rows[0]["defaults"]["steps"] == 28
    assert "shift" in rows[0]["takes"]
    lightning = rows[names.index("sdxl-lightning")]
    assert lightning["steps"] == [1, 2, 4, 8]
    assert lightning["parts"]["unet"].startswith("ByteDance/SDXL-Lightning:")


def test_samplers_are_listed(cli):
    lines = cli("samplers").out.splitlines()
    assert any(line.split()[:2] == ["euler", "yes"] for line in lines)
    rows = cli("samplers", "--json").json
    assert {"name", "aliases", "summary", "flows"} == set(rows[0])


def test_the_command_for_a_random_checkpoint_says_how_to_use_it(cli, tmp_path, monkeypatch):
    """And the command that it prints works, but for the size."""
    monkeypatch.chdir(tmp_path)
    run = cli("random", "flux-dev", "a folder", "--seed", 3)
    assert "noise" in run.out
    _, *argv = shlex.split(run.out.splitlines()[-1])
    assert argv[:4] == ["generate", "flux-dev", "--weights", "a folder"]
    assert cli(*argv, *SMALL).status == 0


def test_the_version_is_told(cli):
    assert cli("--version").out == f"eqxdiff {version('eqxdiff')}\n"


def test_help_needs_no_jax():
    """Nor do mistakes in the command line."""
    code = (
        "import sys; from importlib.metadata import entry_points\n"
        "(script,) = entry_points(group='console_scripts', name='eqxdiff')\n"
        "main = script.load()\n"
        "for argv in ([], ['--help'], ['generate', '--help'], ['generate']): main(argv)\n"
        "assert not {'jax', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "--prompt-file" in run.stdout


@pytest.mark.parametrize("name", ["eqxdiff", "eqxdiff.models", "eqxdiff.models.flux1"])
def test_the_package_exports_what_its_type_checker_sees(name):
    package = importlib.import_module(name)
    seen = {
        ("." * (node.level - 1) + node.module, alias.asname)
        for node in ast.walk(ast.parse(Path(package.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.level and node.module
        for alias in node.names
        if alias.asname
    }
    lazy = {(home, each) for home, names in package._HOMES.items() for each in names}
    assert lazy == {(home, each) for home, each in seen if home in package._HOMES}
    for home, each in seen:
        module = importlib.import_module(f".{home}", name)
        assert getattr(package, each) is getattr(module, each)
        if name == "eqxdiff":
            assert each in dir(package)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_overwrites_itself(monkeypatch):
    """It is gone when something that is to stay is printed."""
    progress = importlib.import_module("eqxdiff.cli.progress")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    times = iter([0.0, 1.0, 2.0, 2.01, 3.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(times))
    report = progress.TextReport(quiet=False)
    for done in (0, 1, 2, 2, 4):
        report.progress("sampling", done, 4)
    report.note("warning", "this stays")
    written = terminal.getvalue()
    assert written.split("\r\x1b[K") == [
        "",
        "sampling: 0 of 4",
        "sampling: 1 of 4",
        "sampling: 2 of 4, 1.00 s each, 2 s left",
        "sampling: 4 of 4",
        "warning: this stays\n",
    ]


def test_a_log_gets_few_lines(monkeypatch):
    progress = importlib.import_module("eqxdiff.cli.progress")
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    times = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress, "monotonic", lambda: next(times))
    report = progress.TextReport(quiet=False)
    for done in range(9):
        report.progress("loading vae", done * 10**9, 8 * 10**9)
    assert log.getvalue().splitlines() == [
        "loading vae: 3.0 of 8.0 GB",
        "loading vae: 6.0 of 8.0 GB",
        "loading vae: 8.0 of 8.0 GB",
    ]


def test_lines_of_json_are_valid_whatever_the_prompt(generate):
    run = generate("-p", 'a "cat" \\ \u2028 😀', "--json", "-o", "{prompt}.png")
    assert json.loads(run.out)["images"][0]["prompt"] == 'a "cat" \\ \u2028 😀'
    assert all(run.events)


@pytest.mark.parametrize("as_json", [False, True])
def test_what_libraries_would_print_is_told_like_the_rest(generate, monkeypatch, as_json):
    """Their warnings become events, and their progress bars stay away from JSON."""
    from huggingface_hub.utils import are_progress_bars_disabled

    hidden = []

    def load(*arguments, **options):
        hidden.append(are_progress_bars_disabled())
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("beware", stacklevel=1)
        return load_module(*arguments, **options)

    monkeypatch.setattr("eqxdiff.pipeline.blueprint.load_module", load)
    run = generate("-p", "a cat", *(["--json"] if as_json else []))
    if as_json:
        assert {"event": "warning", "message": "beware"} in run.events
    else:
        assert "warning: beware" in run.err.splitlines()
    assert hidden == [as_json] * 4
    assert not are_progress_bars_disabled()
