"""The model in the box is found by name, without a download."""

import types

from command import cli as cli

import eqxdiff
from eqxdiff.checkpoint.example import write_example
from eqxdiff.models.flux1 import Flux1, embedded


def test_a_package_without_the_files_has_no_such_model(tmp_path):
    assert embedded.presets(tmp_path) == {}


def test_the_model_in_the_package_is_found_by_name(cli, tmp_path, monkeypatch):
    """With a tiny stand-in for its files, and with no weights named."""
    folder = write_example("flux-schnell", tmp_path / "emoji")
    found = {**Flux1.presets, **embedded.presets(folder)}
    monkeypatch.setattr(Flux1, "presets", types.MappingProxyType(found))
    monkeypatch.chdir(tmp_path)
    done = cli("generate", "flux-emoji", "--prompt", "a red apple", "--steps", "1", "--seed", "0")
    assert done.status == 0, done.err
    (file,) = done.files
    assert (tmp_path / file).is_file()
    assert eqxdiff.open_model("flux-emoji").resolve({}).cfg == 3.0
