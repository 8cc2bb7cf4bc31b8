"""Conversion between layouts: bit for bit, in little memory, whole or not at all."""

import json
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from command import cli as cli

from eqxdiff._errors import SourceError
from eqxdiff.checkpoint import Table, read
from eqxdiff.convert import (
    open_checkpoint,
    plan_file,
    plan_folder,
    recast,
    write,
    write_file,
    write_folder,
)
from eqxdiff.convert.example import write_example
from eqxdiff.convert.open import Opened
from eqxdiff.tensors import SafetensorsFile


pytest_plugins = ["whole_files"]
ONE = pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)
FLUX = pytest.mark.parametrize("checkpoint", ["flux-dev"], indirect=True)


def weights(folder):
    """The bytes of all tensors in a folder, by component and name."""
    tensors = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        for name, array in safetensors.numpy.load_file(file).items():
            tensors[file.parent.name, name] = (array.dtype, array.shape, array.tobytes())
    return tensors


def contents(file):
    tensors = safetensors.numpy.load_file(file)
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()}


@pytest.mark.usefixtures("hub")
def test_there_and_back_again(checkpoint, cli, tmp_path):
    """Folder -> file -> folder and file -> folder -> file keep every bit and every name."""
    model, folder = checkpoint
    to_file = cli("convert", folder / "base", tmp_path / "x.safetensors", "--model", model)
    assert to_file.status == 0, to_file.err
    assert to_file.files == [tmp_path / "x.safetensors"]
    original = contents(folder / "all.safetensors")
    original.pop("alphas_cumprod", None)
    assert contents(tmp_path / "x.safetensors") == original
    back = cli("convert", folder / "all.safetensors", tmp_path / "y", "--model", model)
    assert back.status == 0, back.err
    assert weights(tmp_path / "y") == weights(folder / "base")
    for file in (folder / "base").rglob("*.json"):
        converted = json.loads((tmp_path / "y" / file.relative_to(folder / "base")).read_text())
        wanted = json.loads(file.read_text())
        for name in ("feature_extractor", "safety_checker"):  # which are not converted
            if file.name == "model_index.json" and name in wanted:
                wanted[name] = [None, None]
        assert converted == wanted
    assert not list(tmp_path.glob(".*"))


@FLUX
@pytest.mark.usefixtures("hub")
def test_a_dtype_is_cast_to(checkpoint, cli, tmp_path):
    model, folder = checkpoint
    argv = ("--model", model, "--dtype", "bfloat16", "--json")
    outcome = cli("convert", folder / "all.safetensors", tmp_path / "y", *argv)
    file = SafetensorsFile(tmp_path / "y" / "vae" / "diffusion_pytorch_model.safetensors")
    before = safetensors.numpy.load_file(next((folder / "base" / "vae").glob("*.safetensors")))
    for name, info in file.tensors.items():
        assert info.dtype == ml_dtypes.bfloat16
        out = np.empty(info.shape, info.dtype)
        file.read(name, tuple((0, size) for size in info.shape), out)
        np.testing.assert_array_equal(out, before[name].astype(ml_dtypes.bfloat16))
    summary = outcome.json
    assert summary["missing"] == []
    assert summary["written"]
    assert {item["path"] for item in summary["files"]} == {
        str(path.relative_to(tmp_path / "y")) for path in (tmp_path / "y").rglob("*.*")
    }


@FLUX
@pytest.mark.usefixtures("hub")
def test_one_component_alone(checkpoint, cli, tmp_path):
    """As its authors publish it: without a prefix."""
    model, folder = checkpoint
    argv = ("--model", model, "--only", "transformer", "--to", "single-file")
    outcome = cli("convert", folder / "base", tmp_path / "flux", *argv)
    assert outcome.status == 0, outcome.err
    prefix = "model.diffusion_model."
    assert contents(tmp_path / "flux") == {
        name.removeprefix(prefix): value
        for name, value in contents(folder / "all.safetensors").items()
        if name.startswith(prefix)
    }
    (tmp_path / "flux").rename(tmp_path / "flux.safetensors")
    outcome = cli("convert", tmp_path / "flux.safetensors", tmp_path / "y", "--json")
    assert outcome.json["components"] == ["transformer"]
    assert outcome.json["missing"] == ["text_encoder", "text_encoder_2", "vae"]
    assert "not written (--complete adds them)" in outcome.err
    outcome = cli("convert", tmp_path / "flux.safetensors", tmp_path / "z", "--complete")
    assert outcome.status == 0, outcome.err
    assert weights(tmp_path / "z") == weights(folder / "base")


@FLUX
@pytest.mark.usefixtures("hub")
def test_a_dry_run_writes_nothing(checkpoint, cli, tmp_path):
    model, folder = checkpoint
    argv = ("--model", model, "--dry-run")
    outcome = cli("convert", folder / "all.safetensors", tmp_path / "y", *argv)
    assert outcome.status == 0
    assert "transformer/diffusion_pytorch_model.safetensors" in outcome.out
    assert not list(tmp_path.iterdir())


@FLUX
@pytest.mark.usefixtures("hub")
def test_an_interrupted_conversion_is_gone_on_with(checkpoint, tmp_path):
    """Files that are complete are kept, and nothing has appeared under the name."""
    model, folder = checkpoint
    opened = open_checkpoint(str(folder / "all.safetensors"), model=model)
    targets = plan_folder(opened)
    first, second = targets[0].path, targets[1].path

    def stop(file, done, total):
        if file == second:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(opened, tmp_path / "y", targets, stop)
    assert [path.name for path in tmp_path.iterdir()] == [".y.part"]
    assert (tmp_path / ".y.part" / first).is_file()
    assert not (tmp_path / ".y.part" / second).exists()
    seen = []
    write_folder(opened, tmp_path / "y", targets, lambda file, *_: seen.append(file))
    assert first not in seen
    assert weights(tmp_path / "y") == weights(folder / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


@FLUX
@pytest.mark.usefixtures("hub")
def test_another_conversion_does_not_go_on_with_it(checkpoint, tmp_path):
    model, folder = checkpoint
    opened = open_checkpoint(str(folder / "all.safetensors"), model=model)

    def stop(file, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(opened, tmp_path / "y", plan_folder(opened, np.float16), stop)
    (tmp_path / ".y.part" / "odd").write_text("")
    write_folder(opened, tmp_path / "y", plan_folder(opened))
    assert weights(tmp_path / "y") == weights(folder / "base")
    assert not (tmp_path / "y" / "odd").exists()


@FLUX
@pytest.mark.usefixtures("hub")
def test_a_source_that_changed_meanwhile_is_read_again(checkpoint, tmp_path):
    """A model of two states of its file would be none."""
    model, folder = checkpoint
    file = tmp_path / "all.safetensors"
    shutil.copyfile(folder / "all.safetensors", file)
    opened = open_checkpoint(str(file), model=model)
    second = plan_folder(opened)[1].path

    def stop(file, done, total):
        if file == second:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(opened, tmp_path / "y", plan_folder(opened), stop)
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: array + 1 for name, array in tensors.items()}, file)
    opened, seen = open_checkpoint(str(file), model=model), []
    write_folder(opened, tmp_path / "y", plan_folder(opened), lambda file, *_: seen.append(file))
    assert plan_folder(opened)[0].path in seen
    old, new = weights(folder / "base"), weights(tmp_path / "y")
    assert old.keys() == new.keys()
    assert not [name for name, array in old.items() if new[name] == array]


@FLUX
@pytest.mark.usefixtures("hub")
def test_two_conversions_to_one_target_do_not_mix(checkpoint, tmp_path):
    """A folder has one writer; files are drafted under names of their own."""
    model, folder = checkpoint
    opened = open_checkpoint(str(folder / "all.safetensors"), model=model)
    other = plan_folder(opened, np.float16)
    refused = []

    def rival(file, done, total):
        if not refused:
            with pytest.raises(SourceError, match="Another conversion is writing") as error:
                write_folder(opened, tmp_path / "y", other)
            refused.append(error)

    write_folder(opened, tmp_path / "y", plan_folder(opened), rival)
    assert refused
    assert weights(tmp_path / "y") == weights(folder / "base")
    target = tmp_path / "x.safetensors"
    drafts = set()

    def watch(file, done, total):
        drafts.update(path.name for path in tmp_path.glob(".x.*"))

    for _ in range(2):
        write_file(opened, target, plan_file(opened, target.name), watch)
        target.unlink()
    assert len(drafts) == 2


@FLUX
@pytest.mark.usefixtures("hub")
def test_a_tensor_is_as_wide_as_the_widest_that_it_is_made_of(checkpoint, tmp_path):
    """Not as the first: of a mixed file nothing is narrowed."""
    model, folder = checkpoint
    shutil.copytree(folder / "base", tmp_path / "base")
    (file,) = (tmp_path / "base" / "transformer").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    first, *others = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    narrow = lambda name, array: array.astype(np.float16) if name not in others else array
    safetensors.numpy.save_file({n: narrow(n, a) for n, a in tensors.items()}, file)
    opened = open_checkpoint(str(tmp_path / "base"), model=model)
    target = tmp_path / "x.safetensors"
    write_file(opened, target, plan_file(opened, target.name))
    written = safetensors.numpy.load_file(target)
    (name,) = [name for name in written if name.endswith("double_blocks.0.img_attn.qkv.weight")]
    assert written[name].dtype == np.float32
    joined = np.concatenate([narrow(n, tensors[n]).astype(np.float32) for n in (first, *others)])
    np.testing.assert_array_equal(written[name], joined)


def test_only_pieces_are_in_memory(tmp_path, monkeypatch):
    """Much less than the largest tensor, fused or stacked."""
    monkeypatch.setattr(recast, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(read, "CHUNK_BYTES", 1 << 16)
    fused = Table.parse('stack = ["c"]\n[split]\n"ab" = ["a", "b"]')
    table = Table.parse('prefix = ["x"]\nstack = ["c"]')
    random = np.random.RandomState(0)
    file = {"ab": (2048, 512), "c.0.w": (512, 512), "c.1.w": (512, 512)}
    arrays = {name: random.standard_normal(shape).astype("f4") for name, shape in file.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "in.safetensors")
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    skeleton = {"a": leaf(1536, 512), "b": leaf(512, 512), "c": {"w": leaf(2, 512, 512)}}
    opened = Opened(SafetensorsFile(tmp_path / "in.safetensors"), fused, skeleton)
    part = recast.Recast.make("net", opened, table, None)
    target = write.OutputFile("out.safetensors", dict.fromkeys(part.infos, part))
    tracemalloc.start()
    with open(tmp_path / "out.safetensors", "wb") as out:
        for piece in write._pieces(target):
            out.write(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 800_000
    written = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(np.concatenate([written["x.a"], written["x.b"]]), arrays["ab"])
    np.testing.assert_array_equal(written["x.c.1.w"], arrays["c.1.w"])


@FLUX
@pytest.mark.usefixtures("hub")
def test_what_is_there_is_not_overwritten(checkpoint, cli, tmp_path):
    model, folder = checkpoint
    (tmp_path / "y").mkdir()
    (tmp_path / "x.safetensors").write_text("x")
    for name in ("y", "x.safetensors"):
        outcome = cli("convert", folder / "all.safetensors", tmp_path / name, "--model", model)
        assert "exists already" in outcome.error
    assert not list((tmp_path / "y").iterdir())


@FLUX
@pytest.mark.usefixtures("hub")
def test_a_value_that_does_not_fit_is_refused_and_nothing_left(checkpoint, cli, tmp_path):
    model, folder = checkpoint
    tensors = safetensors.numpy.load_file(folder / "all.safetensors")
    name = "model.diffusion_model.img_in.bias"
    tensors[name] = tensors[name].copy()
    tensors[name][0] = 1e6
    safetensors.numpy.save_file(tensors, tmp_path / "big.safetensors")
    argv = ("--model", model, "--dtype", "float16", "--quiet")
    outcome = cli("convert", tmp_path / "big.safetensors", tmp_path / "y.safetensors", *argv)
    assert f"transformer: {name} holds a value too large for float16" in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["big.safetensors"]


@ONE
@pytest.mark.usefixtures("hub")
def test_what_does_not_tell_its_model_is_refused(checkpoint, cli, tmp_path):
    _, folder = checkpoint
    outcome = cli("convert", folder / "all.safetensors", tmp_path / "y")
    assert "does not tell which model it is of: name it with --model" in outcome.error


@FLUX
def test_a_folder_of_someone_else_is_not_removed(checkpoint, tmp_path):
    model, folder = checkpoint
    (tmp_path / ".y.part").mkdir()
    (tmp_path / ".y.part" / "precious").write_text("x")
    opened = open_checkpoint(str(folder / "base"), model=model)
    with pytest.raises(SourceError, match="in the way"):
        write_folder(opened, tmp_path / "y", plan_folder(opened))
    assert (tmp_path / ".y.part" / "precious").is_file()


def test_layers_without_an_original_layout_are_not_written(cli, tmp_path):
    """The tiny UNet has one layer a level where SDXL has two."""
    write_example("sdxl", tmp_path / "tiny")
    run = cli("convert", tmp_path / "tiny", tmp_path / "x.safetensors", "--model", "sdxl")
    assert "there is no layout for those" in run.error
    assert not (tmp_path / "x.safetensors").exists()
