"""Programs compiled ahead of time: equal pictures, no tracing, and what they refuse."""

import json
import zipfile

import jax
import jax.numpy as jnp
import pytest
from command import SMALL, cli as cli, dev as dev, generate as generate, pixels
from jax import export

from eqxdiff.models.flux1.model import FluxModel
from eqxdiff.models.flux1.network import Transformer
from eqxdiff.models.sdxl.conditioning import EncodedPrompt
from eqxdiff.plan.artefact import describe_tree, rebuild
from eqxdiff.plan.shapes import as_shapes


@pytest.fixture(scope="module")
def artefact(dev, tmp_path_factory):
    from importlib.metadata import entry_points

    file = tmp_path_factory.mktemp("compiled") / "flux.eqx"
    (script,) = entry_points(group="console_scripts", name="eqxdiff")
    words = ["compile", "flux-dev", "--weights", dev, *SMALL, "-o", file]
    assert script.load()([str(word) for word in words]) == 0
    return file


def test_the_picture_is_equal_and_no_network_is_traced(generate, artefact, monkeypatch):
    assert generate("-p", "a cat", "-s", 1, "-o", "traced.png").status == 0
    jax.clear_caches()
    for owner, name in ((Transformer, "__call__"), (FluxModel, "encode"), (FluxModel, "to_image")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("a network was traced"))
    run = generate("-p", "a cat", "-s", 1, "-o", "compiled.png", "--compiled", artefact)
    assert run.status == 0
    assert (pixels("traced.png") == pixels("compiled.png")).all()


def changed(artefact, folder, **fields):
    """A copy of the file whose header says something else."""
    with zipfile.ZipFile(artefact) as old, zipfile.ZipFile(folder / "changed.eqx", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "header.json":
                data = json.dumps({**json.loads(data), **fields}).encode()
            new.writestr(name, data)
    return folder / "changed.eqx"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--width", 128), "is for size 64x64, not 128x64"),
        (("--steps", 3), "is for steps 2, not 3"),
        (("--batch-size", 2), "is for batch size 1, not 2"),
        (("--compute-dtype", "bfloat16"), "is for compute dtype float32, not bfloat16"),
        (("--dtype", "bfloat16"), "is for other weights of text_encoder and text_encoder_2"),
        (("--sampler", "heun"), "another sampler"),
        (("--mesh", "data=1"), "run on one device: leave out --mesh"),
    ],
)
def test_other_pictures_are_refused_with_the_reason(generate, artefact, words, message):
    error = generate("-p", "a cat", "-s", 1, *words, "--compiled", artefact).error
    assert message in error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "flux-schnell"}, "is for model flux-schnell, not flux-dev"),
        ({"platform": "tpu"}, "is for tpu, and JAX runs on cpu"),
        ({"jax": "99.0.0"}, "was made with JAX 99.0.0, and this is JAX"),
        ({"schema": 0}, "was made by another version of eqxdiff"),
    ],
)
def test_files_for_others_are_refused(generate, artefact, tmp_path, fields, message):
    file = changed(artefact, tmp_path, **fields)
    assert message in generate("-p", "a cat", "--compiled", file).error


def test_a_file_that_is_none_is_told(generate, tmp_path):
    (tmp_path / "not.eqx").write_text("no archive")
    error = generate("-p", "a cat", "--compiled", tmp_path / "not.eqx").error
    assert "not.eqx is no file of `eqxdiff compile`, or is damaged" in error
    error = generate("-p", "a cat", "--compiled", tmp_path / "absent.eqx").error
    assert "absent.eqx cannot be read: No such file" in error


def test_programs_for_a_tpu_are_made_without_one(cli, dev, tmp_path):
    file = tmp_path / "tpu.eqx"
    words = ("compile", "flux-dev", "--weights", dev, *SMALL, "--platform", "tpu", "-o", file)
    assert cli(*words).status == 0
    with zipfile.ZipFile(file) as archive:
        header = json.loads(archive.read("header.json"))
        step = export.deserialize(bytearray(archive.read("step.export")))
    assert header["platform"] == "tpu"
    assert header["compute_dtype"] == "bfloat16"
    assert step.platforms == ("tpu",)
    assert cli(*words).error.endswith("give --overwrite, or another name with --output.")


def test_what_encoders_say_is_rebuilt_of_known_classes_alone():
    encoded = EncodedPrompt(jnp.zeros((2, 3)), jnp.zeros(4))
    tree = {"a": (encoded, None), "b": jnp.zeros(1)}
    description = json.loads(json.dumps(describe_tree(as_shapes(tree))))
    leaves = jax.tree.leaves(tree)
    assert jax.tree.structure(rebuild(description, iter(leaves), "eqxdiff")) == (
        jax.tree.structure(tree)
    )
    description["b"] = {"class": ["os", "system"], "fields": {}}
    with pytest.raises(Exception, match="not known here"):
        rebuild({"dict": {"b": description["b"]}}, iter(leaves), "eqxdiff")
