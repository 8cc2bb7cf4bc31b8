"""The published checkpoints of Stable Diffusion, whole: their configs agree with each other, and
each tensor has its place."""

import json
import math
from functools import cache

import jax
import pytest
import test_controlnet
import test_unet
import test_vae
from helpers import MANIFESTS, read_manifest

from eqxdiff.checkpoint import check, read_table
from eqxdiff.models import find_model


MODELS = {
    "sd15": "sd15",
    "sd2-base": "sd2-base",
    "sd21-base": "sd2-base",
    "sd21": "sd21",
    "sd-turbo": "sd-turbo",
    "sdxl": "sdxl",
    "sdxl-lightning": "sdxl",
    "sdxl-turbo": "sdxl-turbo",
}
"""Whose config the UNet has."""

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMON = {"vocab_size": 49408}
CLIP = {
    "clip_l": {
        **dict(zip(SIZES, (768, 3072, 12, 12), strict=True)),
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "clip_h": {
        **dict(zip(SIZES, (1024, 4096, 23, 16), strict=True)),
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
    "clip_bigg": {
        **dict(zip(SIZES, (1280, 5120, 32, 20), strict=True)),
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
}
PARAMETERS = {
    "clip_l": 123_060_480,
    "clip_h": 340_387_840,
    "clip_bigg": 694_659_840,
    "unet_sd15": 859_520_964,
    "unet_sd2": 865_910_724,
    "unet_sdxl": 2_567_463_684,
    "vae_sd": 83_653_863,
    "controlnet_sd15": 361_279_120,
    "controlnet_sd2": 364_228_240,
    "controlnet_sdxl": 1_251_014_160,
}


def manifests(model: str) -> dict[str, str]:
    """Of each component."""
    return json.loads((MANIFESTS / "checkpoints.json").read_text())[model]


def published(model: str) -> dict[str, dict]:
    """The `config.json` of each component."""
    unet = test_unet.PUBLISHED[MODELS[model]]
    vae = test_vae.PUBLISHED["sdxl" if model.startswith("sdxl") else "sd15"]
    configs = {"unet": unet, "vae": vae, "controlnet": test_controlnet.published(unet)}
    for name in ("text_encoder", "text_encoder_2"):
        if name in manifests(model):
            example = json.loads(find_model(model)[0].example(model)[f"{name}/config.json"])
            configs[name] = {**example, **COMMON, **CLIP[manifests(model)[name]]}
    return configs


@pytest.mark.parametrize("model", MODELS)
def test_the_published_configs_agree(model):
    family, preset = find_model(model)
    configs: dict = {n: c.parse(published(model)[n]) for n, c in family.components.items()}
    files = family.example(model)
    read = lambda path: json.loads(files[path])
    configs["pipeline"] = family.parse_index(read("model_index.json"))
    configs["scheduler"] = family.parse_scheduler(read("scheduler/scheduler_config.json"))
    bound = family.bind(model, preset.defaults, configs)
    assert bound.name == model
    assert not bound.inpaints
    if preset.controls:
        assert family.controlnet is not None
        family.control_config(configs, published(model)["controlnet"])


@cache
def count(component, fields: str, manifest: str) -> int:
    """The parameters of a component at full size, onto which the published tensors map."""
    full, table = (
        component.skeleton(component.parse(json.loads(fields))),
        read_table(component.table),
    )
    shapes = read_manifest(manifest)
    check(shapes, table, full)
    kept = [shape for name, shape in shapes.items() if not name.endswith("position_ids")]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(full))
    assert sum(math.prod(shape) for shape in kept) == parameters
    return parameters


@pytest.mark.parametrize("model", MODELS)
def test_the_published_tensors_map_completely(model):
    family, preset = find_model(model)
    components = dict(family.components)
    if preset.controls:
        components["controlnet"] = family.controlnet
    assert set(components) == set(manifests(model))
    for name, manifest in manifests(model).items():
        fields = json.dumps(published(model)[name])
        assert count(components[name], fields, manifest) == PARAMETERS[manifest]


def test_the_first_version_of_everything_is_as_large_as_published():
    """Without the safety checker."""
    total = lambda model: sum(
        PARAMETERS[m] for n, m in manifests(model).items() if n != "controlnet"
    )
    assert total("sd15") == 1_066_235_307
    assert total("sdxl") == 3_468_837_867
