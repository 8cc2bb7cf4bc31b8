"""Original single files: the same module, and the same diffusers tensors, as by diffusers."""

import hashlib
import json
import math
from dataclasses import replace

import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import FIXTURES, fake_tensor, read_manifest

from eqxdiff._errors import CheckpointError
from eqxdiff.checkpoint import Table, check, export_tensors, load_module, read_table
from eqxdiff.models.flux1 import Transformer, TransformerConfig
from eqxdiff.tensors import InMemory
from eqxdiff.vae import AutoencoderKL, AutoencoderKLConfig


TRANSFORMER = TransformerConfig(
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    joint_attention_dim=24,
    num_attention_heads=2,
    num_layers=2,
    num_single_layers=3,
    pooled_projection_dim=20,
    guidance_embeds=True,
)
VAE = AutoencoderKLConfig(
    block_out_channels=(8, 16, 24, 32),
    latent_channels=4,
    layers_per_block=2,
    norm_num_groups=4,
    scaling_factor=1.0,
)
VAE_TABLE = Table.parse('[rename]\n".to_out" = ".to_out.0"', "vae")

LAYOUTS = {
    "flux1_transformer_bfl": (Transformer, TRANSFORMER, read_table("flux1_transformer")),
    "vae_ldm": (AutoencoderKL, VAE, VAE_TABLE),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    """Table of the single file, table of diffusers, skeleton, the file, and the recorded hashes."""
    cls, config, published = LAYOUTS[request.param]
    record = json.loads((FIXTURES / "single_files.json").read_text())[request.param]
    file = {name: fake_tensor(name, tuple(shape)) for name, shape in record["file"].items()}
    skeleton = eqx.filter_eval_shape(lambda: cls.init(config, key=jax.random.key(0)))
    return read_table(request.param), published, skeleton, file, record["diffusers"]


def test_the_module_is_what_diffusers_converts_the_file_to(layout):
    """Each tensor bit for bit, under each prefix that the layout is found with."""
    table, published, skeleton, file, hashes = layout
    for prefix in table.prefix:
        named = {f"{prefix}.{name}" if prefix else name: a for name, a in file.items()}
        module = load_module(InMemory(named), table, skeleton)
        converted = dict(export_tensors(module, published))
        digests = {n: hashlib.sha256(a.tobytes()).hexdigest()[:16] for n, a in converted.items()}
        assert digests == hashes


def test_round_trips_keep_every_bit_and_name(layout):
    """Single file -> diffusers -> single file."""
    table, published, skeleton, file, _ = layout
    module = load_module(InMemory(file), table, skeleton)
    folder = dict(export_tensors(module, published))
    again = dict(export_tensors(load_module(InMemory(folder), published, skeleton), table))
    assert set(again) == set(file)
    for name, array in file.items():
        assert again[name].tobytes() == array.tobytes()


def test_the_written_prefix_can_be_chosen(layout):
    table, _, skeleton, file, _ = layout
    prefix = table.prefix[1]
    module = load_module(InMemory(file), table, skeleton)
    names = {name for name, _ in export_tensors(module, replace(table, prefix=(prefix,)))}
    assert names == {f"{prefix}.{name}" for name in file}


@pytest.mark.parametrize("layout", ["vae_ldm"], indirect=True)
def test_attention_of_the_autoencoder_may_be_matrices(layout):
    """Files that went through diffusers and back have no axes of one pixel."""
    table, published, skeleton, file, hashes = layout
    flat = {
        name: array[:, :, 0, 0] if ".attn_1." in name and array.ndim == 4 else array
        for name, array in file.items()
    }
    converted = dict(export_tensors(load_module(InMemory(flat), table, skeleton), published))
    digests = {n: hashlib.sha256(a.tobytes()).hexdigest()[:16] for n, a in converted.items()}
    assert digests == hashes
    flat["encoder.mid.attn_1.q.weight"] = np.ones((32, 32, 2), np.float32)
    with pytest.raises(CheckpointError, match=r"is \(32, 32, 2\), not \(32, 32, 1, 1\)"):
        load_module(InMemory(flat), table, skeleton)


def test_the_real_file_maps_completely_onto_the_full_size_module():
    """Names and shapes alone, as many parameters as are published."""
    config = TransformerConfig(guidance_embeds=True)
    skeleton = eqx.filter_eval_shape(lambda: Transformer.init(config, key=jax.random.key(0)))
    manifest = read_manifest("flux1_dev_bfl")
    assert sum(math.prod(shape) for shape in manifest.values()) == 11_901_408_320
    check(manifest, read_table("flux1_transformer_bfl"), skeleton)
