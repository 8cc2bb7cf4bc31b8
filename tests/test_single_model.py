"""A model from one file, or with parts from others: the same as from its folder."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import write_checkpoint

from eqxdiff._errors import CheckpointError, SourceError
from eqxdiff.checkpoint import SafetensorsFile, export_tensors, load_module, part, read_table
from eqxdiff.checkpoint.layout import FLUX_DEV, SD1, SD2, SDXL
from eqxdiff.models import find_model
from eqxdiff.pipeline import open_model


KINDS = {"sd15": SD1, "sd21": SD2, "sdxl": SDXL, "flux-dev": FLUX_DEV}
LEVELS = {
    "sd15": [16, 32, 32, 32],
    "sd21": [16, 32, 32, 32],
    "sdxl": None,
}


def example(model):
    """The tiny configs, with as many levels and layers as the single files have."""
    files = dict(find_model(model)[0].example(model))
    if model == "flux-dev":
        return files
    fields = json.loads(files["unet/config.json"])
    fields["layers_per_block"] = 2
    if (widths := LEVELS[model]) is not None:
        fields["block_out_channels"] = widths
        fields["down_block_types"] = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
        fields["up_block_types"] = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
        heads = fields["attention_head_dim"]
        fields["attention_head_dim"] = [*heads, heads[-1]] if isinstance(heads, list) else heads
    return {**files, "unet/config.json": json.dumps(fields)}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    """A model, its folder, and a file of all of it in the original layout."""
    model = request.param
    folder = tmp_path_factory.mktemp(model)
    write_checkpoint(folder / "base", model, files=example(model))
    family, _ = find_model(model)
    tensors = {"alphas_cumprod": np.ones(3, np.float32)} if model != "flux-dev" else {}
    for name, component in family.components.items():
        config = component.parse(json.loads((folder / "base" / name / "config.json").read_text()))
        (weights,) = (folder / "base" / name).glob("*.safetensors")
        published = read_table(component.table)
        module = load_module(SafetensorsFile(weights), published, component.skeleton(config))
        table, prefix = KINDS[model].layout[name]
        tensors |= {
            f"{prefix}.{key.removeprefix(first)}": array
            for first in (_first(table),)
            for key, array in export_tensors(module, read_table(table))
        }
    safetensors.numpy.save_file(tensors, folder / "all.safetensors")
    return model, folder


def _first(table):
    prefix = read_table(table).prefix[0]
    return f"{prefix}." if prefix else ""


@pytest.fixture
def hub(monkeypatch, checkpoint):
    """The model's own repository is the folder."""
    _, folder = checkpoint
    open_source = part.open_source
    stand_in = lambda name, **more: open_source(folder / "base" if name.count("/") == 1 else name)
    monkeypatch.setattr(part, "open_source", stand_in)


def leaves(plan, *components):
    return jax.tree.leaves(plan.load(components or list(plan.components)))


def assert_same(plan, other, *components):
    for got, wanted in zip(leaves(plan, *components), leaves(other, *components), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.usefixtures("hub")
def test_a_single_file_gives_the_same_model_as_a_folder(checkpoint):
    model, folder = checkpoint
    plan = open_model(model, str(folder / "all.safetensors"))
    assert set(plan.parts) == set(plan.family.components)
    assert plan.note.startswith("all.safetensors has no configs, tokenizers: those of ")
    assert_same(plan, open_model(model))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)
def test_what_a_file_lacks_comes_from_the_models_own_repository(checkpoint, tmp_path):
    model, folder = checkpoint
    tensors = safetensors.numpy.load_file(folder / "all.safetensors")
    some = {n: a for n, a in tensors.items() if not n.startswith("first_stage_model")}
    safetensors.numpy.save_file(some, tmp_path / "some.safetensors")
    plan = open_model(model, str(tmp_path / "some.safetensors"))
    assert set(plan.parts) == {"unet", "text_encoder"}
    assert "some.safetensors has no vae, configs, tokenizers" in plan.note
    assert_same(plan, open_model(model), "vae", "text_encoder")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("checkpoint", ["sdxl"], indirect=True)
def test_a_component_is_taken_out_of_a_file_of_a_whole_model(checkpoint):
    model, folder = checkpoint
    file = str(folder / "all.safetensors")
    plan = open_model(model, str(folder / "base"), parts={"vae": file, "text_encoder_2": file})
    assert_same(plan, open_model(model), "vae", "text_encoder_2")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)
def test_nothing_is_left_over_in_silence(checkpoint, tmp_path):
    model, folder = checkpoint
    tensors = safetensors.numpy.load_file(folder / "all.safetensors")
    safetensors.numpy.save_file({**tensors, "odd": np.ones(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="left over: odd"):
        open_model(model, str(tmp_path / "odd.safetensors"))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("checkpoint", ["sdxl"], indirect=True)
def test_fine_tunes_of_sdxl_tell_how_they_were_trained(checkpoint, tmp_path):
    model, folder = checkpoint
    tensors = safetensors.numpy.load_file(folder / "all.safetensors")
    marks = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    safetensors.numpy.save_file({**tensors, **marks}, tmp_path / "v.safetensors")
    scheduler = open_model(model, str(tmp_path / "v.safetensors")).configs["scheduler"]
    assert scheduler.prediction_type == "v_prediction"
    assert scheduler.rescale_betas_zero_snr
    assert open_model(model).configs["scheduler"].prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.ckpt", "is a pickle, which can run any code"),
        ("x.bin", "eqxdiff convert --pickle"),
        ("x.msgpack", "eqxdiff convert"),
        ("none.safetensors", "There is no file"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path, name, words, monkeypatch):
    monkeypatch.setattr(part, "open_source", lambda *_, **__: None)
    if not name.startswith("none"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=words):
        open_model("sd15", str(Path(tmp_path) / name))
