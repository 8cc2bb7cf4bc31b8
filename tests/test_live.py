"""The recorded references are what PyTorch computes today, where it is installed."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import FIXTURES


REFERENCE = Path(__file__).parent / "reference"
SCRIPTS = {
    "flux1": ["flux1.npz"],
    "flux1_pipeline": ["flux1_pipeline.npz"],
    "pictures": ["pictures.npz"],
    "sd_pipeline": ["sd_pipeline.npz"],
    "flux2": ["flux2.npz"],
    "lora": ["lora.npz"],
    "qwen3": ["qwen3.npz"],
    "solvers": ["solvers.npz"],
    "text": ["clip.npz", "t5.npz"],
    "vae": ["vae.npz"],
}
HASHES = {"single_files": "single_files.json", "single_files_sd": "single_files_sd.json.gz"}


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SCRIPTS)
def test_recording_again_gives_the_same(script, tmp_path, monkeypatch):
    record(script, tmp_path, monkeypatch)
    for name in SCRIPTS[script]:
        with np.load(tmp_path / "fixtures" / name) as new, np.load(FIXTURES / name) as old:
            compare(new, old)


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", HASHES)
def test_converters_give_the_same_tensors(script, tmp_path, monkeypatch):
    """Names, shapes and hashes, and the manifests of full size."""
    record(script, tmp_path, monkeypatch)
    read = lambda path: (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    assert read(tmp_path / "fixtures" / HASHES[script]) == read(FIXTURES / HASHES[script])
    for path in (tmp_path / "manifests").iterdir():
        assert path.read_text() == (FIXTURES.parent / "manifests" / path.name).read_text()


def record(script, tmp_path, monkeypatch):
    """Runs a script, whose files go to `tmp_path`."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    if script == "lora":
        pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(REFERENCE))
    (tmp_path / "fixtures").mkdir()
    (tmp_path / "manifests").mkdir()
    for path in FIXTURES.glob("*.json"):  # what some scripts read their cases from
        (tmp_path / "fixtures" / path.name).write_text(path.read_text())
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.delitem(sys.modules, "_torch", raising=False)
    shared = importlib.import_module("_torch")
    monkeypatch.setattr(shared, "FIXTURES", tmp_path / "fixtures")
    spec = importlib.util.spec_from_file_location(f"recording_{script}", REFERENCE / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


def compare(new, old):
    assert set(new) == set(old)
    for key in old:
        if key.endswith("rounding") or "bfloat16" in key:
            continue  # a measure of noise
        if old[key].dtype.kind in "fc":
            scale = np.abs(old[key]).max() + 1e-30
            rounding = float(old[f"{key}/rounding"]) if f"{key}/rounding" in old else 0.0
            bound = max(1e-5, 5 * rounding)  # what the reference itself loses to float32
            assert np.abs(new[key] - old[key]).max() < bound * scale, key
        elif old[key].dtype.kind in "SU":
            assert json.dumps(str(new[key])) == json.dumps(str(old[key])), key
        else:
            assert np.abs(np.int64(new[key]) - np.int64(old[key])).max() <= 1, key
