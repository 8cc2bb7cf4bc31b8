"""Original single files of Stable Diffusion 1, 2 and XL: the same tensors as by diffusers."""

import gzip
import hashlib
import json
import math
from functools import cache

import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import FIXTURES, fake_tensor, read_manifest

from eqxdiff.checkpoint import check, export_tensors, load_module, read_table
from eqxdiff.models.unet.config import UNetConfig
from eqxdiff.models.unet.controlnet import ControlNet, ControlNetConfig
from eqxdiff.models.unet.network import UNet
from eqxdiff.tensors import InMemory
from eqxdiff.text import CLIPTextConfig, CLIPTextModel
from eqxdiff.vae import AutoencoderKL, AutoencoderKLConfig


UNET = UNet.init, UNetConfig.parse
CONTROL = ControlNet.init, ControlNetConfig.parse
CLIP = CLIPTextModel.init, CLIPTextConfig.parse
LAYOUTS = {
    "unet_sd15": ("unet_ldm", "unet", UNET),
    "unet_sd2": ("unet_ldm", "unet", UNET),
    "unet_sdxl": ("unet_sgm", "unet", UNET),
    "unet_refiner": ("unet_ldm", "unet", UNET),
    "controlnet": ("controlnet_ldm", "controlnet", CONTROL),
    "clip_h": ("clip_openclip", "clip", CLIP),
    "clip_bigg": ("clip_openclip", "clip", CLIP),
}
NEVER_USED = ("logit_scale", "text_projection", "transformer.resblocks.23.")
"""Of an OpenCLIP encoder, where the model has no place for it."""


@cache
def records():
    return json.loads(gzip.decompress((FIXTURES / "single_files_sd.json.gz").read_bytes()))


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    """Table of the single file, table of diffusers, skeleton, the file, and the recorded hashes."""
    table, published, (init, parse) = LAYOUTS[request.param]
    record = records()[request.param]
    file = {name: fake_tensor(name, tuple(shape)) for name, shape in record["file"].items()}
    skeleton = eqx.filter_eval_shape(lambda: init(parse(record["config"]), key=jax.random.key(0)))
    return read_table(table), read_table(published), skeleton, file, record["diffusers"]


def test_the_module_is_what_diffusers_converts_the_file_to(layout):
    """Each tensor bit for bit, under each prefix that the layout is found with."""
    table, published, skeleton, file, hashes = layout
    converted = dict(export_tensors(load_module(InMemory(file), table, skeleton), published))
    assert {n: hashlib.sha256(a.tobytes()).hexdigest()[:8] for n, a in converted.items()} == hashes
    for prefix in table.prefix:
        named = {f"{prefix}.{name}" if prefix else name: a.shape for name, a in file.items()}
        check(named, table, skeleton)


def test_round_trips_keep_every_bit_and_name(layout):
    """Single file -> diffusers -> single file, but for what no model has a place for."""
    table, published, skeleton, file, _ = layout
    prefix = f"{table.prefix[0]}."
    module = load_module(InMemory(file), table, skeleton)
    folder = dict(export_tensors(module, published))
    again = dict(export_tensors(load_module(InMemory(folder), published, skeleton), table))
    assert all(name.startswith(prefix) for name in again)
    for name, array in again.items():
        assert file[name.removeprefix(prefix)].tobytes() == array.tobytes()
    lost = {name for name in file if f"{prefix}{name}" not in again}
    assert all(name.startswith(NEVER_USED) for name in lost)


def unet_config(kind):
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    linear = {"use_linear_projection": True}
    levels = {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20)}
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return UNetConfig(
        **{
            "sd15": {"cross_attention_dim": 768},
            "sd2": {"cross_attention_dim": 1024, **linear},
            "sdxl": {
                **{**levels, **linear, **added, "cross_attention_dim": 2048},
                "down_block_types": (plain, cross, cross),
                "transformer_layers_per_block": (1, 2, 10),
                "projection_class_embeddings_input_dim": 2816,
            },
            "refiner": {
                **{**linear, **added, "cross_attention_dim": 1280},
                "block_out_channels": (384, 768, 1536, 1536),
                "attention_head_dim": (6, 12, 24, 24),
                "down_block_types": (plain, cross, cross, plain),
                "transformer_layers_per_block": 4,
                "projection_class_embeddings_input_dim": 2560,
            },
        }[kind]
    )


def clip_config(width, layers, heads, *, projects):
    kind = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
    return CLIPTextConfig(
        width, 4 * width, layers, heads, projection_dim=width, architectures=(kind,)
    )


VAE = {"layers_per_block": 2, "norm_num_groups": 32, "scaling_factor": 1.0}
WIDTHS = (128, 256, 512, 512)
FULL_SIZE = {
    "unet_sd15_ldm": ("unet_ldm", UNet, unet_config("sd15"), 859_520_964),
    "unet_sd2_ldm": ("unet_ldm", UNet, unet_config("sd2"), 865_910_724),
    "unet_sdxl_ldm": ("unet_sgm", UNet, unet_config("sdxl"), 2_567_463_684),
    "unet_refiner_ldm": ("unet_ldm", UNet, unet_config("refiner"), None),
    "controlnet_sd15_ldm": (
        *("controlnet_ldm", ControlNet, ControlNetConfig(unet_config("sd15")), 361_279_120),
    ),
    "clip_h_openclip": (
        *("clip_openclip", CLIPTextModel, clip_config(1024, 23, 16, projects=False), None),
    ),
    "clip_bigg_openclip": (
        *("clip_openclip", CLIPTextModel, clip_config(1280, 32, 20, projects=True), None),
    ),
    "vae_sd_ldm": (
        "vae_ldm",
        AutoencoderKL,
        AutoencoderKLConfig(block_out_channels=WIDTHS, latent_channels=4, **VAE),
        83_653_863,
    ),
    "vae_flux_ldm": (
        "vae_ldm",
        AutoencoderKL,
        AutoencoderKLConfig(
            **{"block_out_channels": WIDTHS, "latent_channels": 16, **VAE},
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        83_819_683,
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_real_file_maps_completely_onto_the_full_size_module(name):
    """Names and shapes alone, as many parameters as are published."""
    table, cls, config, parameters = FULL_SIZE[name]
    skeleton = eqx.filter_eval_shape(lambda: cls.init(config, key=jax.random.key(0)))
    manifest = read_manifest(name)
    if parameters is not None:
        assert sum(math.prod(shape) for shape in manifest.values()) == parameters
    prefix = read_table(table).prefix[0]
    named = {f"{prefix}.{tensor}" if prefix else tensor: s for tensor, s in manifest.items()}
    check(named, read_table(table), skeleton)


def test_two_tensors_swapped_are_seen():
    """The hashes tell apart what has the same shape."""
    record = records()["unet_sd15"]
    hashes = list(record["diffusers"].values())
    assert len(set(hashes)) == len(hashes)
    one, two = (
        fake_tensor(f"input_blocks.1.1.transformer_blocks.0.attn1.to_{k}.weight", (8, 8))
        for k in "qk"
    )
    assert not np.array_equal(one, two)
