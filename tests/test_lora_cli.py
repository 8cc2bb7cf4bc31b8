"""LoRAs on the command line: `generate --lora`, and the commands `lora inspect|merge|extract`."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from command import SMALL, cli as cli
from helpers import relative_error
from lora_files import FORMATS, QKV, Draft, noise
from PIL import Image

from eqxdiff import lora
from eqxdiff.convert.example import write_example
from eqxdiff.pipeline import load as load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny FLUX.1, and an adapter for it and another for its text encoders."""
    folder = tmp_path_factory.mktemp("lora")
    write_example("flux-dev", folder / "model", seed=0)
    draft = Draft("flux-dev")
    FORMATS["kohya-flux"][2](draft)
    safetensors.numpy.save_file(draft.file, folder / "style.safetensors", {"ss_tag": "a cat"})
    text = {name: array for name, array in draft.file.items() if "_te" in name}
    safetensors.numpy.save_file(text, folder / "text.safetensors")
    return folder


def generate(cli, folder, tmp_path, *options: str):
    output = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.png")
    common = ("--prompt", "a cat", "--seed", "1", "--weights", str(folder / "model"), *SMALL)
    return cli("generate", "flux-dev", *common, "--output", output, *options)


def picture(run) -> np.ndarray:
    assert run.status == 0, run.err
    return np.asarray(Image.open(run.files[0]), np.int32)


def test_merged_and_at_run_time_the_picture_is_the_same(cli, folder, tmp_path):
    style = str(folder / "style.safetensors")
    plain = picture(generate(cli, folder, tmp_path))
    run = generate(cli, folder, tmp_path, "--lora", f"{style}@0.5")
    merged = picture(run)
    at_run_time = picture(
        generate(cli, folder, tmp_path, "--lora", f"{style}@0.5", "--lora-mode", "runtime")
    )
    assert np.abs(merged - plain).max() > 1
    assert np.abs(merged - at_run_time).max() <= 1
    assert re.search(
        r"changes layers: 2 of text_encoder, 4 of text_encoder_2, \d+ of trans", run.err
    )
    zero = picture(generate(cli, folder, tmp_path, "--lora", f"{style}@0"))
    assert (zero == plain).all()


def test_each_scale_belongs_to_its_own_adapter(cli, folder, tmp_path):
    """And the picture's metadata says what was applied."""
    style, text = str(folder / "style.safetensors"), str(folder / "text.safetensors")
    options = ("--lora", f"{style}@transformer=0", "--lora", f"{text}@-1")
    run = generate(cli, folder, tmp_path, *options)
    assert (picture(run) == picture(generate(cli, folder, tmp_path))).all()  # they cancel out
    with Image.open(run.files[0]) as image:
        record = json.loads(image.text["eqxdiff"])
    strengths = [one["strength"] for one in record["loras"]]
    assert strengths == ["1,transformer=0", "-1"]
    assert record["loras"][1]["layers"] == {"text_encoder": 2, "text_encoder_2": 4}
    assert all(re.fullmatch("[0-9a-f]{64}", one["sha256"]) for one in record["loras"])


def test_what_does_not_fit_is_an_error_before_any_weight_is_loaded(cli, folder, tmp_path):
    file = {"lora_unet_double_blocks_7_img_attn_proj.diff": noise("a", 64, 64)}
    safetensors.numpy.save_file(file, tmp_path / "deep.safetensors")
    deep = str(tmp_path / "deep.safetensors")
    error = generate(cli, folder, tmp_path, "--lora", deep).error
    assert "deep.safetensors fits nothing in this model" in error
    draft = Draft("flux-dev")
    draft.lora("lora_unet_double_blocks_1_img_attn_qkv", QKV)
    safetensors.numpy.save_file(draft.file | file, tmp_path / "half.safetensors")
    half = str(tmp_path / "half.safetensors")
    error = generate(cli, folder, tmp_path, "--lora", half).error
    assert "half.safetensors: 1 of 3 tensors cannot be applied" in error
    run = generate(cli, folder, tmp_path, "--lora", half, "--lora-partial")
    assert picture(run).shape == (64, 64, 3)
    assert "1 tensors are not applied" in run.err


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere.safetensors", "There is no file nowhere.safetensors"),
        ("style.safetensors@0.5,0.7", "after a comma comes NAME=SCALE"),
        ("style.safetensors@unet=0.5", "touches nothing called 'unet'"),
        ("model/transformer", "is not a LoRA or one of its relatives"),
    ],
)
def test_mistakes_are_told(cli, folder, tmp_path, spec, said):
    spec = spec if spec.startswith("nowhere") else str(folder / spec)
    assert said in generate(cli, folder, tmp_path, "--lora", spec).error


def test_inspect_tells_what_a_file_is(cli, folder):
    run = cli("lora", "inspect", str(folder / "style.safetensors"))
    assert run.status == 0
    for line in ("format   kohya", "ss_tag: a cat", "a model like FLUX.1"):
        assert line in run.out
    facts = cli("lora", "inspect", str(folder / "style.safetensors"), "--json").json
    assert facts["kinds"] == {"lora": len(facts["targets"])}
    target = next(t for t in facts["targets"] if t["module"].endswith("1_img_attn_qkv"))
    assert target["shape"] == [192, 64]
    assert (target["rank"], target["alpha"]) == (2, 1)


def test_merge_writes_a_model_that_needs_no_lora(cli, folder, tmp_path):
    style, out = str(folder / "style.safetensors@0.5"), tmp_path / "merged"
    options = ("--weights", str(folder / "model"), "--lora", style)
    run = cli("lora", "merge", "flux-dev", str(out), *options)
    assert run.status == 0, run.err
    (tmp_path / "pictures").mkdir()
    with_lora = picture(generate(cli, folder, tmp_path / "pictures", "--lora", style))
    common = ("--prompt", "a cat", "--seed", "1", "--weights", str(out), *SMALL)
    output = str(tmp_path / "pictures" / "merged.png")
    merged = picture(cli("generate", "flux-dev", *common, "--output", output))
    assert np.abs(merged - with_lora).max() <= 1
    assert "exists already" in cli("lora", "merge", "flux-dev", str(out), *options).error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "pictures"]


def test_extract_finds_what_was_merged(cli, folder, tmp_path):
    """The difference is of low rank, so that an adapter of that rank holds all of it."""
    out, file = tmp_path / "merged", tmp_path / "found.safetensors"
    style = str(folder / "style.safetensors")
    base = str(folder / "model")
    options = ("--weights", base, "--lora", style, "--dtype", "float32")
    assert cli("lora", "merge", "flux-dev", str(out), *options).status == 0
    options = ("--rank", "12", "--dtype", "float32", "--text", "--json")
    found = cli("lora", "extract", "flux-dev", base, str(out), str(file), *options).json
    assert set(found["kept"]) == {"transformer", "text_encoder", "text_encoder_2"}
    assert min(found["kept"].values()) > 0.999999
    adapter = lora.load(str(file))
    assert adapter.format.name == "diffusers"
    small = cli("lora", "extract", "flux-dev", base, str(out), str(tmp_path / "s.safetensors"),
                "--rank", "1", "--json").json  # fmt: skip
    assert 0.1 < small["kept"]["transformer"] < 0.99
    error = cli("lora", "extract", "flux-dev", base, base, str(tmp_path / "x.safetensors")).error
    assert "nothing to extract" in error
    assert not (tmp_path / "x.safetensors").exists()
    error = cli("lora", "extract", "flux-dev", base, str(out), str(tmp_path / "x.bin")).error
    assert "let its name end in .safetensors" in error


def test_lightning_may_be_a_lora_on_the_base_model(tmp_path):
    """As its authors publish it too, under kohya's names; the preset does the rest."""
    base = write_example("sdxl", tmp_path / "base", seed=0)
    unet = load_model("sdxl", str(base)).components["unet"]
    shape = unet.down_blocks[1].attentions[0].transformer_blocks.attn2.to_k.weight.shape[1:]
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    up, down = noise("up", shape[0], 2), noise("down", 2, shape[1])
    file = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    file[f"{stem}.alpha"] = np.array(4, np.float32)
    safetensors.numpy.save_file(file, tmp_path / "sdxl_lightning_4step_lora.safetensors")
    spec = str(tmp_path / "sdxl_lightning_4step_lora.safetensors")
    pipe = load_model("sdxl-lightning", str(base), loras=[spec])
    layer = lambda unet: unet.down_blocks[1].attentions[0].transformer_blocks.attn2.to_k
    change = layer(pipe.components["unet"]).weight - layer(unet).weight
    assert relative_error(change[0], 2 * up @ down) < 5e-6
    settings = pipe.blueprint.resolve({})
    assert (settings.steps, settings.timestep_spacing) == (4, "trailing")


def test_what_a_file_says_of_itself_does_not_control_the_terminal(cli, folder, tmp_path):
    tensors = safetensors.numpy.load_file(folder / "style.safetensors")
    evil = {"ss_tag": "a\x1b]0;x\x07\nbase: mine"}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", evil)
    run = cli("lora", "inspect", str(tmp_path / "x.safetensors"))
    assert all(line.isprintable() for line in run.out.split("\n"))
    assert r"ss_tag: a\x1b]0;x\x07\nbase: mine" in run.out
