"""A run of training: from a folder of images to a model, stopped and resumed, with all that can
be wrong with its input."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import cli as cli
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from safetensors.numpy import load_file

import eqxdiff
from eqxdiff._errors import (
    CheckpointError,
    ConfigError,
    DataError,
    SettingError,
    TrainingError,
)
from eqxdiff.checkpoint import read_table, save_module
from eqxdiff.convert.example import randomised
from eqxdiff.models import find_model
from eqxdiff.training import (
    TrainConfig,
    read_config,
    read_folder,
    saved_states,
    train,
    train_step,
)
from eqxdiff.training.data import batch_of, dropped, pick, read_image
from eqxdiff.training.saving import load_state, save_state
from eqxdiff.training.studio import encode_batch, open_studio, reconstruct


STEPS = 4
PARTS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def write_model(folder):
    """The tiny FLUX of `eqxdiff random` with an even smaller autoencoder."""
    family, _ = find_model("flux-schnell")
    files = dict(family.example("flux-schnell"))
    fields = json.loads(files["vae/config.json"])
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        fields[name] = fields[name][:2]
    files["vae/config.json"] = json.dumps(fields | {"mid_block_add_attention": False})
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    for part, stem in PARTS.items():
        component = family.components[part]
        skeleton = component.skeleton(component.parse(json.loads(files[f"{part}/config.json"])))
        module = randomised(skeleton, component.rules, np.random.default_rng(0))
        save_module(module, read_table(component.table), folder / part, stem=stem)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The same programs again and again: compiled once."""
    new = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    old = {name: getattr(jax.config, name) for name in new}
    for values in (new, None, old):
        if values is None:
            yield
            continue
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny checkpoint, six pictures and two configs."""
    root = tmp_path_factory.mktemp("world")
    write_model(root / "model")
    pictures = root / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}\nthe {i}th picture\n")
    text = f"""
[model]
name = "flux-schnell"
folder = "{root / "model"}"
train = ["transformer", "text_encoder_2"]
zero = ['transformer\\.proj_out']
[model.weights]
text_encoder = "{root / "model" / "text_encoder"}"
text_encoder_2 = "{root / "model" / "text_encoder_2"}"
vae = "{root / "model" / "vae"}"
[loss]
std = 0.8
[data]
folder = "{pictures}"
height = 16
width = 16
caption_dropout = 0.3
max_sequence_length = 8
[optimizer]
learning_rate = 1e-3
warmup = 2
[run]
steps = {STEPS}
batch_size = 4
log_every = 1
save_every = 2
sample_every = 4
[sample]
prompts = ["picture 1", "picture 2"]
steps = 1
"""
    (root / "flux.toml").write_text(text)
    vae = text.replace('["transformer", "text_encoder_2"]', '["vae"]')
    vae = re.sub("(zero|text_encoder|text_encoder_2|prompts) = .*\n", "", vae)
    (root / "vae.toml").write_text(vae)
    return root


@pytest.fixture(scope="module")
def finished(world):
    """The run of flux.toml, and what it told."""
    told = []
    output = world / "run"
    train(read_config(world / "flux.toml"), output, report=lambda *event: told.append(event))
    return output, told


def changed(config: TrainConfig, **sections) -> TrainConfig:
    """The config with other fields, by section."""
    new = {name: dataclasses.replace(getattr(config, name), **f) for name, f in sections.items()}
    return dataclasses.replace(config, **new)


def log_of(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_run_leaves_a_log_samples_and_a_model_that_generates(finished):
    output, told = finished
    assert [step for step, _ in log_of(output)] == [1, 2, 3, 4]
    assert len(list((output / "samples").glob("*.png"))) == 1
    assert [path.name for path in saved_states(output / "states")] == [
        "step-00000002",
        "step-00000004",
    ]
    notes = [facts["message"] for event, facts in told if event == "note"]
    assert any(note.startswith("sample.prompts: prompt 1 is too long") for note in notes)
    progress = [facts for event, facts in told if event == "progress"]
    assert progress[-1]["step"] == progress[-1]["steps"] == STEPS
    assert progress[-1]["images_per_second"] > 0
    assert progress[0]["seconds_left"] > 0
    pipe = eqxdiff.load("flux-schnell", str(output / "model"))
    given = {"steps": 1, "height": 16, "width": 16, "max_sequence_length": 8}
    assert eqxdiff.generate(pipe, "a cat", **given).arrays.shape == (1, 16, 16, 3)


def test_a_killed_run_goes_on_to_the_same_bits(world, finished, tmp_path):
    """Killed between two states: the steps after the last one are made again, alike."""
    config = read_config(world / "flux.toml")

    class Killed(BaseException):
        pass

    def die(event, facts):
        if event == "progress" and facts["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "run", report=die)
    assert [step for step, _ in log_of(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "model").exists()
    train(config, tmp_path / "run", resume=True)
    assert log_of(tmp_path / "run") == log_of(finished[0])
    for part in ("transformer", "text_encoder_2"):
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        file = f"model/{part}/{stem}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (finished[0] / file).read_bytes()


KILLER = """
import os, signal, sys
from eqxdiff.training import read_config, train
def report(event, facts):
    if event == "progress" and facts["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
train(read_config(sys.argv[1]), sys.argv[2], report=report)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_outright_leaves_a_run_to_go_on_with(world, finished, tmp_path):
    """By SIGKILL, which nothing can catch, between the state of step 2 and the end."""
    command = [sys.executable, "-c", KILLER, str(world / "flux.toml"), str(tmp_path / "run")]
    cache = jax.config.jax_compilation_cache_dir
    done = subprocess.run(
        command, env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    train(read_config(world / "flux.toml"), tmp_path / "run", resume=True)
    assert log_of(tmp_path / "run") == log_of(finished[0])


class Reached(BaseException):
    """A step is about to be made of these arguments."""


def products_of_a_step(config, output, monkeypatch):
    """The products in the lowered program of a run's step."""

    def stop(*args):
        raise Reached(*args)

    monkeypatch.setattr("eqxdiff.training.run.train_step", stop)
    with pytest.raises(Reached) as reached:
        train(config, output)
    return products_in(train_step.lower(*reached.value.args))


def products_in(lowered):
    """The products of matrices and the convolutions of a lowered program."""
    return re.findall(r"stablehlo\.(?:dot_general|convolution).*", lowered.as_text())


@pytest.mark.filterwarnings("ignore:Some donated buffers")
@pytest.mark.parametrize("name", ["flux.toml", "vae.toml"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_in_float32_has_float32_products(world, tmp_path, monkeypatch, name, optimizer):
    """Forward, backward and in the optimizer, on every device: else GPUs and TPUs round them."""
    config = changed(read_config(world / name), optimizer={"name": optimizer})
    products = products_of_a_step(config, tmp_path / "run", monkeypatch)
    assert len(products) > 20
    assert [line for line in products if line.count("HIGHEST") != 2] == []


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_a_step_in_bfloat16_has_fast_products(world, tmp_path, monkeypatch):
    model = {"compute_dtype": "bfloat16"}
    config = changed(read_config(world / "flux.toml"), model=model)
    products = products_of_a_step(config, tmp_path / "run", monkeypatch)
    narrow = [line for line in products if "bf16" in line]
    assert narrow
    assert [line for line in narrow if "HIGHEST" in line] == []


def test_pictures_are_encoded_by_float32_products(world):
    """Those that the denoiser is trained on, and the reconstructions on the sample sheets."""
    studio, _ = open_studio(read_config(world / "flux.toml"))
    for program in (encode_batch, reconstruct):
        products = products_in(program.lower(studio.vae, jnp.zeros((2, 16, 16, 3))))
        assert products
        assert [line for line in products if line.count("HIGHEST") != 2] == []


def test_a_component_is_given_with_a_config_of_its_own(world, tmp_path):
    """In any form that `parts` of `eqxdiff.load` take; the written model has that config."""
    given = tmp_path / "given"
    shutil.copytree(world / "model" / "vae", given)
    fields = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps(fields | {"scaling_factor": 0.25, "_mark": 1}))
    config = changed(
        read_config(world / "flux.toml"),
        model={"weights": (("vae", str(given)),)},
        run={"steps": 1, "batch_size": 1},
        sample={"prompts": ()},
    )
    studio, _ = open_studio(config)
    assert studio.vae.scaling_factor == 0.25
    written = json.loads((train(config, tmp_path / "run") / "vae" / "config.json").read_text())
    assert (written["scaling_factor"], written["_mark"]) == (0.25, 1)


def test_only_what_is_selected_moves(world, tmp_path):
    """All begin at given weights, and one layer is trained."""
    folders = tuple((part, str(world / "model" / part)) for part in PARTS)
    fields = {"train": (r"transformer\.proj_out\.weight",), "weights": folders, "zero": ()}
    config = read_config(world / "flux.toml")
    config = changed(
        config, model=fields, run={"steps": 1, "batch_size": 1}, sample={"prompts": ()}
    )
    folder = train(config, tmp_path / "run")
    moved = []
    for part, stem in PARTS.items():
        file = f"{part}/{stem}.safetensors"
        before, after = (load_file(root / file) for root in (world / "model", folder))
        moved += [f"{part}.{name}" for name in before if (before[name] != after[name]).any()]
    assert moved == ["transformer.proj_out.weight"]


def test_an_autoencoder_is_trained_and_its_latents_measured(world, tmp_path):
    folder = train(read_config(world / "vae.toml"), tmp_path / "run")
    config = json.loads((folder / "vae" / "config.json").read_text())
    before = json.loads((world / "model" / "vae" / "config.json").read_text())
    assert config["scaling_factor"] != before["scaling_factor"]
    assert {k: v for k, v in config.items() if "factor" not in k} == {
        k: v for k, v in before.items() if "factor" not in k
    }
    losses = [loss for _, loss in log_of(tmp_path / "run")]
    assert np.isfinite(losses).all()
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1


def test_a_folder_in_the_way_is_refused(world, finished, tmp_path):
    config = read_config(world / "flux.toml")
    with pytest.raises(TrainingError, match="exists already: give `resume` to go on"):
        train(config, finished[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="holds no run to go on with"):
        train(config, tmp_path, resume=True)
    other = changed(config, optimizer={"learning_rate": 5e-4}, data={"caption_dropout": 0.0})
    with pytest.raises(
        TrainingError, match=r"data\.caption_dropout, optimizer\.learning_rate: put them back"
    ):
        train(other, finished[0], resume=True)


def test_a_state_of_other_shapes_is_refused(tmp_path):
    path = save_state(tmp_path, 3, {"a": np.zeros((2, 3), np.float32), "b": np.ones(2)}, {})
    like = {"a": np.zeros((3, 2), np.float32), "c": np.ones(2)}
    with pytest.raises(CheckpointError, match="another model or optimizer") as error:
        load_state(path, like)
    assert "a: [2, 3] of float32, not [3, 2] of float32" in str(error.value)
    assert "b: unknown" in str(error.value)
    assert "c: missing" in str(error.value)


def test_a_state_that_cannot_be_written_leaves_the_last(tmp_path, monkeypatch):
    """A full disk: one error, and nothing of the new state is there."""
    state = {"a": np.zeros(2, np.float32)}
    save_state(tmp_path, 1, state, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eqxdiff.training.saving.write_tensors", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        save_state(tmp_path, 2, state, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_last_states_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_state(tmp_path, step, {"a": np.full(1, step, np.int32)}, {"step": step})
    assert [path.name for path in saved_states(tmp_path)] == ["step-00000002", "step-00000010"]
    assert load_state(saved_states(tmp_path)[-1], {"a": np.zeros(1, np.int32)})["a"] == 10


def copied(world, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(world / "pictures", folder)
    return folder


def test_a_folder_of_images_has_captions_beside_or_listed(world, tmp_path):
    folder = copied(world, tmp_path)
    assert read_folder(folder)[2].captions == ("picture 2", "the 2th picture")
    lines = [{"file_name": "3.png", "text": "three"}, {"file_name": "1.png", "text": ["a", "b"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    examples = read_folder(folder)
    assert [(e.path.name, e.captions) for e in examples] == [
        ("1.png", ("a", "b")),
        ("3.png", ("three",)),
    ]


def test_bad_data_is_one_clear_error(world, tmp_path):
    folder = copied(world, tmp_path)
    with pytest.raises(DataError, match="There is no folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        read_folder(tmp_path / "empty")
    (folder / "4.txt").unlink()
    with pytest.raises(DataError, match=r"4\.png has no caption: write one into 4\.txt"):
        read_folder(folder)
    assert len(read_folder(folder, captions=False)) == 6
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:100])
    with pytest.raises(DataError, match=r"5\.png is broken or is no image"):
        read_image(folder / "5.png", 16, 16)
    for line in ("{", '{"text": "no name"}', '{"file_name": 3}', '["a"]'):
        (folder / "metadata.jsonl").write_text(f'{{"file_name": "1.png", "text": "a"}}\n{line}\n')
        with pytest.raises(DataError, match="line 2 is not"):
            read_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}\n')
    with pytest.raises(DataError, match=r"line 1: there is no file 9\.png"):
        read_folder(folder)


def test_an_image_of_another_size_is_cut_to_cover(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 20, 20)
    assert image.shape == (20, 20, 3)
    assert image.mean() > 0.9


def test_every_example_is_seen_once_an_epoch():
    seen = np.concatenate([batch_of(step, 4, 10, seed=1) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    assert list(batch_of(3, 4, 10, seed=1)) == list(seen[12:16])
    assert (pick(0, np.array([1, 1, 5]), 0) < [1, 1, 5]).all()
    assert 200 < dropped(0, 1000, 0.3, 0).sum() < 400


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("steps = 4", "steps = 0", "run.steps: below 1"),
        ("steps = 4", "stepz = 4", "run.stepz: unknown"),
        ("height = 16", 'height = "tall"', "data.height: 'tall' is not int"),
        ("warmup = 2", 'name = "sgd"', "optimizer.name: 'sgd' is not 'adamw' or 'muon'"),
        ("batch_size = 4", "batch_size = 4\naccumulate = 3", "no multiple of run.accumulate"),
        ("[run]", "[run", "is not valid TOML"),
    ],
)
def test_a_bad_config_is_one_clear_error(world, tmp_path, before, after, problem):
    text = (world / "flux.toml").read_text()
    (tmp_path / "bad.toml").write_text(text.replace(before, after, 1))
    with pytest.raises(ConfigError, match=re.escape(problem)):
        read_config(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"train": ("unet",)}, "model.train: unet matches no parameter"),
        ({"weights": ()}, "name its folder"),
        ({"folder": "nowhere"}, r"model.folder: there is no folder nowhere"),
        ({"weights": (("brain", "x"),)}, "there is no component brain"),
        ({"zero": ("nothing",)}, "model.zero: nothing matches no parameter"),
    ],
)
def test_a_model_that_cannot_be_begun_is_one_clear_error(world, tmp_path, fields, problem):
    config = changed(read_config(world / "flux.toml"), model=fields)
    with pytest.raises(SettingError, match=problem):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "fields", "problem"),
    [
        ("data", {"height": 17}, "data: The height 17 is not a multiple"),
        ("sample", {"steps": 2000}, "sample: `steps` 2000 is out of range"),
    ],
)
def test_settings_that_the_model_refuses_end_a_run_before_it_begins(
    world, tmp_path, section, fields, problem
):
    config = changed(read_config(world / "flux.toml"), **{section: fields})
    with pytest.raises(SettingError, match=problem):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_explodes_ends_the_run(world, tmp_path, monkeypatch):
    """After the first state, which stays."""

    def explode(task, state, batch):
        state = dataclasses.replace(state, step=state.step + 1)
        return state, jnp.asarray(1.0 if state.step < 3 else jnp.nan), {}

    monkeypatch.setattr("eqxdiff.training.run.train_step", explode)
    with pytest.raises(TrainingError, match="not finite after step 3: lower"):
        train(read_config(world / "vae.toml"), tmp_path / "run")
    assert [path.name for path in saved_states(tmp_path / "run" / "states")] == ["step-00000002"]


def test_the_command_trains(cli, world, tmp_path):
    text = (world / "vae.toml").read_text().replace("steps = 4", "steps = 2")
    (tmp_path / "vae.toml").write_text(text)
    output = tmp_path / "run"
    done = cli("train", tmp_path / "vae.toml", "--output", output)
    assert done.status == 0
    assert done.out.strip() == str(output / "model")
    assert re.search(r"step 2 of 2: loss \d\.\d+, [\d.]+ images/s, 0:00:00 left", done.err)
    again = cli("train", tmp_path / "vae.toml", "--output", output)
    assert again.error == (
        f"{output} exists already: give --resume to go on with the run in it, or another --output."
    )
    told = cli("train", tmp_path / "vae.toml", "--output", output, "--resume", "--json")
    assert told.json == {"model": str(output / "model")}
    assert told.events[-1]["event"] == "file"
