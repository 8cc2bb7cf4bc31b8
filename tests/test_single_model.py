"""A model from one file, or with parts from others: the same as from its folder."""

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from eqxdiff._errors import CheckpointError, SourceError
from eqxdiff.hub import part
from eqxdiff.pipeline import open_model


pytest_plugins = ["whole_files"]


def leaves(plan, *components):
    return jax.tree.leaves(plan.load(components or list(plan.components)))


def assert_same(plan, other, *components):
    for got, wanted in zip(leaves(plan, *components), leaves(other, *components), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("checkpoint", ["sdxl", "flux-dev", "flux2-klein-4b"], indirect=True)
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
