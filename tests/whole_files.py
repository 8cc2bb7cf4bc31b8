"""Tiny checkpoints with as many levels and layers as the single files have, as folder and file."""

import json

import numpy as np
import pytest
import safetensors.numpy
from helpers import write_checkpoint

from eqxdiff.checkpoint import export_tensors, load_module, read_table
from eqxdiff.convert import open as opening
from eqxdiff.hub import part
from eqxdiff.models import find_model
from eqxdiff.tensors import SafetensorsFile


MODELS = ("sd15", "sd21", "sdxl", "flux-dev")
LEVELS = {
    "sd15": [16, 32, 32, 32],
    "sd21": [16, 32, 32, 32],
    "sdxl": None,
}


def example(model):
    """The tiny configs, with as many levels and layers as the single files have."""
    files = dict(find_model(model)[0].example(model))
    if not model.startswith("sd"):
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


@pytest.fixture(scope="session", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """A model, its folder, and a file of all of it in the original layout."""
    model = request.param
    folder = tmp_path_factory.mktemp("whole") / model
    write_checkpoint(folder / "base", model, files=example(model))
    family, _ = find_model(model)
    tensors = {"alphas_cumprod": np.ones(3, np.float32)} if model.startswith("sd") else {}
    for name, component in family.components.items():
        config = component.parse(json.loads((folder / "base" / name / "config.json").read_text()))
        (weights,) = (folder / "base" / name).glob("*.safetensors")
        published = read_table(component.table)
        module = load_module(SafetensorsFile(weights), published, component.skeleton(config))
        table, prefix = family.files.of(model).layout[name]
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
    monkeypatch.setattr(opening, "open_source", stand_in)
