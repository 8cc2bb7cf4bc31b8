"""ControlNets against diffusers."""

import dataclasses
import json
import math
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES, compiled_fast, fake_tensor, read_manifest, relative_error
from test_unet import (
    LATER,
    PUBLISHED,
    SD1,
    added_of,
    apply,
    assert_agrees,
    load_unet,
    parse,
    read_inputs,
)

from eqxdiff._errors import ConfigError
from eqxdiff.checkpoint import check, export_infos, leaf_paths, load_module, read_table
from eqxdiff.models.unet import controlnet as _controlnet
from eqxdiff.models.unet.controlnet import ControlNet, ControlNetConfig
from eqxdiff.models.unet.rules import CONTROLNET
from eqxdiff.sharding import logical_axes
from eqxdiff.tensors import InMemory


KINDS = ("sd1", "sd2", "sdxl")
SCALES = {"edges": 0.7, "depth": 1.2}
OF_UNETS = ("_class_name", "center_input_sample", "out_channels", "sample_size", "up_block_types")


def published(unet: dict) -> dict:
    """A ControlNet's config, as published with those of UNets."""
    shared = {key: value for key, value in unet.items() if key not in OF_UNETS}
    return {
        **shared,
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb",
    }


@cache
def read_reference():
    with np.load(FIXTURES / "controlnet.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def reference():
    return read_reference()


@pytest.fixture
def level(kind):
    """SD 1.5 is compiled as users compile it, and the others in less time."""
    with compiled_fast(kind != "sd1"):
        yield


@cache
def skeleton(config: ControlNetConfig) -> ControlNet:
    return eqx.filter_eval_shape(lambda: ControlNet.init(config, key=jax.random.key(0)))


@cache
def controlnet(kind: str, name: str) -> ControlNet:
    config = ControlNetConfig.parse(json.loads(str(read_reference()[f"{kind}/config"])))
    order = "bgr" if name == "depth" else "rgb"
    return load_controlnet(
        dataclasses.replace(config, controlnet_conditioning_channel_order=order), name
    )


def load_controlnet(config: ControlNetConfig, name: str) -> ControlNet:
    table = read_table("controlnet")
    infos = export_infos(skeleton(config), table)
    tensors = {
        key: fake_tensor(f"{name}.{key}", info.shape, 3.0 if "cond_embedding" in key else 1.0)
        for key, info in infos.items()
    }
    return load_module(InMemory(tensors), table, skeleton(config))


@eqx.filter_jit
def residuals(model: ControlNet, inputs, image, scale, guess=False):
    x, context = inputs["x"], inputs["context"]
    added = added_of(inputs)
    return model(x, inputs["timestep"], context, image, added, scale=scale, guess=guess)


def run(reference, kind: str, name: str, guess: bool = False):
    inputs = read_inputs(reference, kind)
    scale = jnp.float32(SCALES[name])
    return residuals(controlnet(kind, name), inputs, inputs[f"image/{name}"], scale, guess)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["plain", "guess"])
def test_residuals_agree_with_diffusers(level, reference, kind, mode):
    ours = flat(run(reference, kind, "edges", guess=mode == "guess"))
    assert_agrees(ours, reference, f"{kind}/{mode}/residuals")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [("edges",), ("edges", "depth")], ids=len)
def test_a_controlled_unet_agrees_with_diffusers(level, reference, kind, names):
    """With one, and with two, of which the second was trained on BGR."""
    unet = load_unet(parse(reference[f"{kind}/unet"]))
    control = _controlnet.sum_residuals([run(reference, kind, name) for name in names])
    out = apply(unet, read_inputs(reference, kind), residuals=control)
    assert_agrees(out, reference, f"{kind}/{len(names)}/out")


def test_the_image_moves_the_output(reference):
    inputs = read_inputs(reference, "sd1")
    unet = load_unet(parse(reference["sd1/unet"]))
    image, scale = inputs["image/edges"], jnp.float32(1)
    controls = [residuals(controlnet("sd1", "edges"), inputs, x, scale) for x in (image, 1 - image)]
    outs = [apply(unet, inputs, residuals=control) for control in controls]
    assert relative_error(*outs) > 0.1


def test_a_scale_of_zero_is_off(reference):
    inputs = read_inputs(reference, "sd1")
    image = inputs["image/edges"]
    off = residuals(controlnet("sd1", "edges"), inputs, image, jnp.float32(0))
    assert not flat(off).any()


def test_a_new_controlnet_changes_nothing(fast):
    """Its last convolutions are zero."""

    @eqx.filter_jit
    def last(config):
        model = ControlNet.init(config, key=jax.random.key(0))
        return model.controlnet_down_blocks, model.controlnet_mid_block

    assert not flat(last(controlnet("sd1", "edges").config)).any()


def test_gradients_reach_every_weight(fast, reference):
    inputs = read_inputs(reference, "sd1")

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(model, inputs):
        x, context, image = inputs["x"], inputs["context"], inputs["image/edges"]
        out = model(x, inputs["timestep"], context, image, scale=jnp.float32(1))
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out))

    config = controlnet("sd1", "edges").config
    shallow = dataclasses.replace(config.unet, layers_per_block=1)
    model = load_controlnet(dataclasses.replace(config, unet=shallow), "edges")
    for path, leaf in leaf_paths(grad(model, inputs)).items():
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-4, path


def test_a_control_image_of_another_size_is_an_error(reference):
    inputs = read_inputs(reference, "sd1")
    image = inputs["image/edges"].transpose(1, 0, 2)
    with pytest.raises(ValueError, match="is 24x32 where 32x24 is wanted"):
        residuals(controlnet("sd1", "edges"), inputs, image, jnp.float32(1))


@pytest.mark.parametrize(
    ("model", "manifest", "count", "parameters"),
    [
        ("sd15", "controlnet_sd15", 340, 361_279_120),
        ("sd21", "controlnet_sd2", 340, 364_228_240),
        ("sdxl", "controlnet_sdxl", 844, 1_251_014_160),
    ],
)
def test_full_size_maps_onto_the_published_tensors(model, manifest, count, parameters):
    shapes, table = read_manifest(manifest), read_table("controlnet")
    full = skeleton(ControlNetConfig.parse(published(PUBLISHED[model])))
    check(shapes, table, full)
    assert len(shapes) == count
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(full)) == parameters
    assert {name: info.shape for name, info in export_infos(full, table).items()} == shapes


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_every_leaf_matches_one_sharding_rule(model):
    full = skeleton(ControlNetConfig.parse(published(PUBLISHED[model])))
    for path, leaf in leaf_paths(full).items():
        logical_axes(path, leaf.ndim, CONTROLNET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name: 'UNet2DConditionModel'"),
        ({"global_pool_conditions": True}, "global_pool_conditions: True is not supported"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type: 'UNetMidBlock2D' is not"),
        ({"controlnet_conditioning_channel_order": "grb"}, "channel_order: 'grb'"),
        ({"conditioning_embedding_out_channels": []}, "out_channels: an empty list"),
        ({"conditioning_channels": "3"}, "conditioning_channels: '3' is not of type int"),
        ({"use_magic": True}, "use_magic: an unknown field"),
    ],
)
def test_unsupported_configs_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        ControlNetConfig.parse({**published({**SD1, **LATER}), **change})
