"""What a user gets wrong is one clear sentence and a status, and leaves no half-written file."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from command import SMALL, cli as cli, dev as dev, generate as generate, schnell as schnell
from huggingface_hub.errors import GatedRepoError
from safetensors.numpy import load_file, save_file


SHAPE = (1, 4, 8, 8)


@pytest.fixture
def copy(dev, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(dev, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """No picture, no part of one, and no empty folder, unless a test says so."""
    yield
    folder = tmp_path / "pictures"
    assert not folder.exists() or list(folder.iterdir()) == []


def sentence(text: str) -> bool:
    return text.endswith((".", '"')) and "\n" not in text


# What is wrong with the options.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", 0], "--steps 0 is out of range: it is from 1 to 1000."),
        (["--width", 100], "The width 100 is not a multiple of 16: use 96 or 112."),
        (["--height", 0], "--height 0 is out of range: it is at least 1."),
        (["--num-images", 0], "--num-images 0 is out of range: it is from 1 to "),
        (["--batch-size", 0], "--batch-size 0 is out of range: it is at least 1."),
        (["--seed", -1], "--seed -1 is out of range: it is from 0 to 4294967295."),
        (["--seed", 2**32], "--seed 4294967296 is out of range"),
        (["--guidance", "nan"], "--guidance nan is not a finite number."),
        (["--shift", 0], "--shift 0.0 is out of range: it is above 0."),
        (["--max-sequence-length", 513], "--max-sequence-length 513 is out of range"),
        (["-n", "ugly"], "would ignore --negative-prompt"),
        (["-n", "ugly", "--cfg", 1], "give --cfg above 1."),
        (["--sampler", "eular"], "There is no sampler 'eular'; the nearest is 'euler'."),
        (["--sampler", "ddim"], "The sampler ddim cannot be used with a rectified flow; use euler"),
        (["--offload", "text", "--release", "text"], "give one."),
        (["--revision", "main"], "is a local folder, which has no revision 'main'."),
        (
            ["--mesh", "data=2,rows=2"],
            "write the sizes of some of cfg, data, fsdp, context, tensor",
        ),
        (["--mesh", "data=0"], "--mesh data=0 is not understood"),
        (["--mesh", "data=2,data=4"], "is not understood"),
        (["--attention", "pallas_tpu"], "--attention pallas_tpu needs a TPU, and this is a CPU"),
        (["--attention", "cudnn_flash_te"], "--attention cudnn_flash_te needs a GPU"),
        (["--attention-blocks", "512"], "write the queries and the keys of a block, as in"),
        (["--mesh", "data=64"], "needs more than the 8 here."),
        (["--mesh", "data=2", "--batch-size", 3], "--batch-size 3 is not a multiple of 2,"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(generate, argv, message):
    run = generate("-p", "a cat", *argv)
    assert run.status == 1
    assert message in run.error
    assert sentence(run.error)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dtype", "float8"], "'float8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["--compute-dtype", "int8"], "'int8' is not one of"),
        (["--offload", "vae"], "'vae'"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--stepz", 3], "No such option"),
        (["--prompt"], "requires an argument"),
        (["stray"], "Got unexpected extra argument"),
    ],
)
def test_a_command_line_that_is_no_command_line_is_refused(generate, argv, message):
    run = generate(*argv)
    assert run.status == 2
    assert message in run.error
    assert sentence(run.error)


def test_settings_that_the_model_would_ignore_are_refused(cli, schnell):
    run = cli("generate", "flux-schnell", "--weights", schnell, *SMALL, "-p", "a", "-g", 3)
    assert "flux-schnell would ignore --guidance" in run.error
    assert "--cfg above 1" in run.error


def test_an_unknown_model_is_refused_with_the_nearest(cli, tmp_path):
    for argv in (["generate", "flux-def", "-p", "x"], ["random", "flux-def", tmp_path / "new"]):
        assert "'flux-def'. Did you mean flux-dev?" in cli(*argv).error
    assert cli("generat").status == 2


def test_errors_are_json_where_json_is_asked_for(generate):
    run = generate("-p", "a", "--json", "--steps", 0)
    assert (run.status, run.out) == (1, "")
    assert run.events[-1]["event"] == "error"
    assert "--steps 0" in run.events[-1]["message"]
    assert json.loads(generate("--json", "--stepz", 0).err)["event"] == "error"


# Prompts.


def test_no_prompt_is_refused(generate, tmp_path):
    assert "There is no prompt: give --prompt or --prompt-file." in generate().error
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n\r\n")
    assert generate("--prompt-file", blank).error == f"There is no prompt in {blank}."


def test_a_prompt_file_that_cannot_be_read_is_refused(generate, tmp_path):
    assert "none.txt cannot be read: No such file" in generate("--prompt-file", "none.txt").error
    assert "Is a directory" in generate("--prompt-file", tmp_path).error
    latin = tmp_path / "latin.txt"
    latin.write_bytes("ein Käfer".encode("latin-1"))
    assert generate("--prompt-file", latin).error == f"{latin} is no UTF-8 text: see byte 5."


def test_a_prompt_of_broken_bytes_is_refused(generate):
    assert (
        "no valid Unicode" in generate("-p", b"a \xff cat".decode(errors="surrogateescape")).error
    )


# Where the weights are.


def test_a_missing_folder_is_refused(cli):
    error = cli("generate", "flux-dev", "--weights", "/no/such/folder", "-p", "x").error
    assert "There is no folder /no/such/folder;" in error


def test_a_file_that_is_no_weights_is_told(cli, dev):
    error = cli("generate", "flux-dev", "--weights", dev / "model_index.json", "-p", "x").error
    assert "model_index.json is not a valid safetensors file" in error


def test_offline_with_nothing_cached_is_told(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    error = cli("generate", "flux-dev", "-p", "x").error
    assert "black-forest-labs/FLUX.1-dev is not in the local cache" in error
    assert "offline" in error


@pytest.mark.parametrize(
    ("status", "token", "said", "told"),
    [
        (401, None, "", "is gated and you are not logged in"),
        (403, "hf_x", "", "your account has no access to it; accept its licence"),
        (403, "hf_x", "enable access ... fine-grained token", "fine-grained token may not read"),
        (401, "hf_x", "User Access Token is expired", "Your Hub token has expired"),
    ],
)
def test_why_a_repository_is_closed_is_told_apart(cli, monkeypatch, status, token, said, told):
    """`test_hub` has more of these."""

    def refuse(*_, **__):
        response = SimpleNamespace(
            status_code=status, headers={"X-Error-Message": said}, request=None
        )
        raise GatedRepoError(f"{status} Client Error. {said}", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    run = cli("generate", "flux-dev", "-p", "x")
    assert run.status == 1
    assert told in run.error
    assert sentence(run.error)


# What is in the weights.


def weights(folder: Path, part: str = "transformer") -> Path:
    (file,) = (folder / part).glob("*.safetensors")
    return file


def change(folder: Path, part: str, **fields: object) -> None:
    file = folder / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def damage(folder: Path, how: str) -> None:
    file = weights(folder)
    data = file.read_bytes()
    if how == "truncated":
        file.write_bytes(data[:-1])
    elif how == "garbage":
        file.write_bytes(data[:8] + b"\xff" * 64 + data[72:])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "page":
        file.write_bytes(b"<!DOCTYPE html><html>sign in</html>")
    elif how == "gone":
        file.unlink()
    else:
        tensors = load_file(file)
        name = "proj_out.weight"
        if how == "missing":
            del tensors[name]
        elif how == "extra":
            tensors["surplus.weight"] = np.zeros(3, np.float32)
        elif how == "misshapen":
            tensors[name] = tensors[name][:-1].copy()
        elif how == "nan":
            tensors[name][0, 0] = np.nan
        save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "truncated"),
        ("garbage", "is not a valid safetensors file"),
        ("empty", "is not a valid safetensors file"),
        ("page", "is not a valid safetensors file"),
        ("gone", "has no safetensors weights"),
        ("missing", "proj_out.weight"),
        ("extra", "surplus.weight"),
        ("misshapen", "proj_out.weight"),
        ("nan", "transformer: proj_out.weight holds a value that is not finite."),
    ],
)
def test_damaged_weights_are_refused(generate, copy, how, message):
    damage(copy, how)
    run = generate("-p", "a cat", "--weights", copy, "--quiet")
    assert run.status == 1
    assert message in run.error


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "_class_name"),
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "_class_name"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size: 2 is not supported"),
        ("transformer/config.json", {"new_feature": 2}, "new_feature: an unknown field"),
        ("transformer/config.json", {"joint_attention_dim": 48}, "joint_attention_dim 48 is not"),
        ("text_encoder/config.json", {"hidden_act": "swish"}, "hidden_act"),
        ("vae/config.json", {"_class_name": "AutoencoderDC"}, "_class_name"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "_class_name"),
    ],
)
def test_a_config_of_another_architecture_is_refused(generate, copy, part, fields, message):
    change(copy, part, **fields)
    run = generate("-p", "a cat", "--weights", copy)
    assert run.status == 1
    assert message in run.error


def test_a_config_that_is_damaged_or_missing_is_refused(generate, copy):
    config = copy / "vae" / "config.json"
    config.write_text('{"act_fn": ')
    assert "is not valid JSON" in generate("-p", "x", "--weights", copy).error
    config.unlink()
    assert "has no vae/config.json" in generate("-p", "x", "--weights", copy).error


def test_weights_of_another_model_are_refused(generate, schnell):
    """They have no guidance to embed, which the settings find before any weights are read."""
    error = generate("-p", "x", "-g", 3, "--weights", schnell).error
    assert "would ignore --guidance" in error


# Noise.


def write_noise(path: Path, how: str) -> None:
    array = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    if how == "shape":
        array = array[..., :-1]
    elif how == "count":
        array = np.concatenate([array, array])
    elif how == "nan":
        array[0, 0, 0, 0] = np.nan
    elif how == "integers":
        array = array.astype(np.int32)
    elif how == "objects":
        array = np.array([{}], object)
    elif how == "overflow":
        array = np.full(SHAPE, 1e300)
    if path.suffix == ".npy":
        np.save(path, array, allow_pickle=True)
    elif how == "several":
        save_file({"a": array, "b": array}, path)
    else:
        save_file({"a": array}, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", "--noise has the shape (1, 4, 8, 7); these images need (1, 4, 8, 8)."),
        ("count", "--noise has the shape (2, 4, 8, 8)"),
        ("nan", "not made of finite floating point numbers"),
        ("integers", "holds int32 numbers, and noise is floating point."),
        ("overflow", "not made of finite floating point numbers"),
        ("cut", "valid"),
    ],
)
def test_noise_that_is_none_is_refused(generate, tmp_path, suffix, how, message):
    path = tmp_path / f"noise{suffix}"
    write_noise(path, how)
    run = generate("-p", "a cat", "--noise", path)
    assert message in run.error
    assert sentence(run.error)
    assert "loading" not in run.err


def test_a_noise_file_of_another_kind_is_refused(generate, tmp_path):
    assert "There is no file none.npy" in generate("-p", "x", "--noise", "none.npy").error
    assert "ends neither in .npy nor" in generate("-p", "x", "--noise", "noise.pt").error
    for how, suffix, message in (
        ("objects", ".npy", "is no valid .npy file"),
        ("several", ".safetensors", "should hold one tensor, the noise, and holds: a, b."),
    ):
        path = tmp_path / f"noise{suffix}"
        write_noise(path, how)
        assert message in generate("-p", "x", "--noise", path).error


# Where the pictures go.


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{name}.png", "unknown placeholder {name}; there are {model}, {seed}, {index}, {prompt}."),
        ("{}.png", "unknown placeholder {}"),
        ("{seed!r}.png", "unknown placeholder {seed}"),
        ("{seed.real}.png", "unknown placeholder"),
        ("{seed.png", "brace without its pair"),
        ("}.png", "brace without its pair"),
        ("{index:99999}.png", "{index:99999}; write {index:03} or {prompt:20}."),
        ("{model:03}.png", "a width that is not understood"),
        ("picture.jpg", "picture.jpg is no PNG file: let its name end in .png."),
        ("picture", "is no PNG file"),
        ("x" * 300 + ".png", "cannot be written: File name too long."),
        ("/proc/picture.png", "/proc cannot be written: No such file or directory."),
        ("/proc/new/picture.png", "/proc/new cannot be written: No such file or directory."),
        ("null\0.png", "is no name that a file can have"),
        ("/dev/null/picture.png", "/dev/null/picture.png cannot be written: Not a directory."),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(generate, template, message):
    run = generate("-p", "a cat", "-o", template)
    assert message in run.error
    assert sentence(run.error)


def test_several_pictures_need_several_names(generate):
    run = generate("-p", "a", "-p", "b", "-s", 1, "-o", "{model}-{seed}.png")
    assert "gives several pictures the name flux-dev-1.png: put {index} into it." in run.error


def test_nothing_is_overwritten(generate, tmp_path):
    """Nor written through a dangling link; and what may be overwritten is a file, not a folder."""
    there = tmp_path / "there.png"
    there.write_text("mine")
    message = "exists already: give --overwrite, or another name"
    assert message in generate("-p", "a", "-o", there).error
    latents = there.rename(tmp_path / "there.npy")
    assert message in generate("-p", "a", "-o", "a.png", "--save-latents", latents).error
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "nowhere")
    assert message in generate("-p", "a", "-o", link).error
    assert latents.read_text() == "mine"
    folder = tmp_path / "folder.npy"
    folder.mkdir()
    run = generate("-p", "a", "--save-latents", folder, "--overwrite")
    assert run.error == f"{folder} is a folder."


def test_a_file_that_appears_meanwhile_is_kept(generate, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"

    def fsync(_: int) -> None:
        path.write_text("somebody else's")

    monkeypatch.setattr(os, "fsync", fsync)
    run = generate("-p", "a cat", "-o", path, "--quiet")
    assert run.error == f"{path} has come into being meanwhile, and is kept."
    assert path.read_text() == "somebody else's"
    assert not list(tmp_path.glob(".*"))


def test_latents_need_a_known_format(generate):
    run = generate("-p", "a cat", "--save-latents", "latents.pt")
    assert "--save-latents latents.pt ends neither in .npy nor in .safetensors." in run.error


def test_a_random_checkpoint_is_written_over_nothing(cli, tmp_path, dev):
    assert "exists already" in cli("random", "flux-dev", dev).error
    assert "cannot be written" in cli("random", "flux-dev", "/proc/new").error
    assert (
        "--seed -1 is out of range" in cli("random", "flux-dev", tmp_path / "x", "--seed=-1").error
    )
    assert list(tmp_path.iterdir()) == []


# What goes wrong half-way.


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot be written: No space left"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_what_is_not_written_whole_is_not_written(generate, monkeypatch, failure, status, message):
    """The second picture fails: the first stays, and nothing else."""
    calls = []

    def fsync(_: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise failure

    monkeypatch.setattr(os, "fsync", fsync)
    run = generate("-p", "a", "-p", "b", "-s", 1, "-o", "new/folder/{index}.png", "--quiet")
    assert run.status == status
    assert run.files == [Path("new/folder/0.png")]
    assert message in run.err
    assert [path.name for path in Path("new/folder").iterdir()] == ["0.png"]
    shutil.rmtree("new")


def test_an_interrupted_start_leaves_no_folder(generate, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("eqxdiff.pipeline.blueprint.load_module", interrupt)
    run = generate("-p", "a", "-o", "new/folder/a.png", "--quiet")
    assert (run.status, run.error) == (130, "Interrupted.")


def test_a_device_that_is_full_is_told(generate, monkeypatch):
    def exhaust(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying")

    monkeypatch.setattr("eqxdiff.pipeline.blueprint.load_module", exhaust)
    run = generate("-p", "a", "--quiet")
    assert run.status == 1
    assert "too little memory" in run.error


def test_a_mistake_of_ours_has_a_traceback(generate, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("eqxdiff.pipeline.blueprint.load_module", fail)
    with pytest.raises(ZeroDivisionError):
        generate("-p", "a", "--quiet")


SCRIPT = (
    "import sys; from importlib.metadata import entry_points as e; "
    "(script,) = e(group='console_scripts', name='eqxdiff'); sys.exit(script.load()())"
)


def process(*argv: object, prelude: str = "", **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", prelude + SCRIPT, *map(str, argv)],
        stderr=subprocess.PIPE,
        text=True,
        **{"stdout": subprocess.PIPE, **options},
    )


def test_a_full_disk_is_told_by_a_real_process(dev, tmp_path):
    """No file may grow beyond a kilobyte, which takes the place of a disk that is full."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)); "
    argv = ["generate", "flux-dev", "--weights", dev, *SMALL, "-p", "x", "-q", "-o", "x.png"]
    with process(*argv, "--no-compile-cache", prelude=limit, cwd=tmp_path) as run:
        out, err = run.communicate()
    assert (run.returncode, out, err) == (
        1,
        "",
        "error: x.png cannot be written: File too large.\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_real_process_cleanly(dev, tmp_path, number, status):
    argv = ["generate", "flux-dev", "--weights", dev, *SMALL, "-p", "x", "--steps", 500]
    cache = {**os.environ, "XDG_CACHE_HOME": str(tmp_path.parent / "cache")}
    # A shell's background job is told to ignore SIGINT, and so would be what it starts.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    options = {"prelude": heed, "cwd": tmp_path, "env": cache}
    with process(*argv, "--json", "-o", "new/x.png", **options) as run:
        for line in run.stderr:
            if '"sampling", "done": 3' in line:
                break
        run.send_signal(number)
        out, err = run.communicate()
    assert (run.returncode, out) == (status, "")
    assert json.loads(err.splitlines()[-1])["event"] == "error"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_output_that_nobody_reads_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with process("--version", stdout=write) as run:
        os.close(write)
        assert run.communicate()[1] == ""
    assert run.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_told():
    with open("/dev/full", "w") as full, process("--version", stdout=full) as run:
        err = run.communicate()[1]
    assert (run.returncode, err) == (1, "error: No space left on device.\n")
