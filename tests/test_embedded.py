"""The model in the box is found by name, without a download."""

import sys
from pathlib import Path

import numpy as np
import pytest
from command import cli as cli

import eqxdiff
from eqxdiff.convert.example import write_example
from eqxdiff.models.flux1 import embedded
from eqxdiff.models.flux1.family import FLUX1


def test_a_package_without_the_files_has_no_such_model(tmp_path):
    assert embedded.presets(tmp_path) == {}


def test_the_model_in_the_package_is_found_by_name(cli, tmp_path, monkeypatch):
    """With a tiny stand-in for its files, and with no weights named."""
    folder = write_example("flux-schnell", tmp_path / "emoji")
    for name, preset in embedded.presets(folder).items():
        monkeypatch.setitem(FLUX1.presets, name, preset)
    monkeypatch.chdir(tmp_path)
    done = cli("generate", "flux-emoji", "--prompt", "a red apple", "--steps", "1", "--seed", "0")
    assert done.status == 0, done.err
    (file,) = done.files
    assert (tmp_path / file).is_file()
    assert eqxdiff.open_model("flux-emoji").resolve({}).cfg == 3.0


REPOSITORY = Path(__file__).parents[1]
CAPTIONS = {
    "a red apple on a yellow background": "yellow",
    "a rocket on a black background": "black",
    "a penguin on a pink background": "pink",
    "a green heart on a white background": "white",
}


@pytest.fixture(scope="module")
def palette() -> dict[str, np.ndarray]:
    sys.path.insert(0, str(REPOSITORY / "recipes" / "flux_emoji"))
    try:
        from make_data import COLOURS
    finally:
        sys.path.pop(0)
    return {name: np.array(rgb) / 255 for name, rgb in COLOURS.items()}


def test_it_is_small():
    files = [path for path in embedded.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24_000_000
    assert {path.name for path in files} >= {"emoji.tsv", "held_out.tsv"}


def test_it_draws_the_background_that_it_is_asked_for(palette):
    pipe = eqxdiff.load("flux-emoji")
    result = eqxdiff.generate(pipe, list(CAPTIONS), seed=0, batch_size=len(CAPTIONS), steps=10)
    for picture, colour in zip(result.arrays, CAPTIONS.values(), strict=True):
        corner = picture[:4, :4].mean(axis=(0, 1))
        distances = {name: np.linalg.norm(rgb - corner) for name, rgb in palette.items()}
        assert min(distances, key=distances.get) == colour
        assert picture[16:48, 16:48].std() > 0.1  # and something on it
