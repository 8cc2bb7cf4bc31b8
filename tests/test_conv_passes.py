"""Convolutions in the form that a platform computes best, and prompts' keys computed ahead."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import compiled_fast, relative_error
from test_unet import added_of, assert_agrees, read_inputs, read_reference, unet

from eqxdiff import passes
from eqxdiff._errors import SettingError
from eqxdiff.models.unet.network import AddedConditioning
from eqxdiff.nn import Adapted, Conv2d, HWIOConv2d, WinogradConv2d


# Sides that are odd, smaller than a tile, and of several strips with a rest.
SIZES = [(7, 9), (1, 3), (21, 130)]


@pytest.mark.parametrize("size", SIZES)
def test_winograds_algorithm_is_the_convolution(size):
    """In its values and in the gradients by the image and the bias, in a batch."""
    keys = jax.random.split(jax.random.key(0), 3)
    conv = Conv2d.init(6, 5, 3, padding=1, key=keys[0])
    x = jax.random.normal(keys[1], (2, *size, 6))
    toward = jax.random.normal(keys[2], (2, *size, 5))

    def value(layer, x):
        return jnp.sum(jax.vmap(layer)(x) * toward)

    laid = WinogradConv2d.of(conv)
    of_x = jax.jit(jax.grad(value, argnums=1))
    assert relative_error(jax.jit(jax.vmap(laid))(x), jax.vmap(conv)(x)) < 1e-6
    assert relative_error(of_x(laid, x), of_x(conv, x)) < 1e-6
    of_bias = lambda layer: jax.grad(value)(layer, x).bias
    assert relative_error(of_bias(laid), of_bias(conv)) < 1e-6


def test_a_pass_lays_convolutions_by_platform_and_gives_them_back():
    make = lambda channels, **kw: Conv2d.init(channels, 64, 3, key=jax.random.key(0), **kw)
    wide, narrow = make(64, padding=1), make(4, padding=1)
    halving = make(64, padding=1, stride=2)
    adapted = Adapted(wide, jnp.ones(1), bias_change=jnp.ones((1, 64)))
    tree = (wide, narrow, halving, adapted)
    kinds = [type(layer) for layer in passes.lay_convolutions(tree, "cpu")]
    assert kinds == [WinogradConv2d, HWIOConv2d, HWIOConv2d, Adapted]
    on_tpu = passes.lay_convolutions(tree, "tpu")
    assert [type(layer) for layer in on_tpu] == [HWIOConv2d, HWIOConv2d, HWIOConv2d, Adapted]
    assert eqx.tree_equal(passes.published(on_tpu), tree)
    with pytest.raises(SettingError, match="before `lay_convolutions`"):
        passes.published(WinogradConv2d.of(wide))
    for layer in (narrow, halving):
        with pytest.raises(ValueError, match="3x3 convolutions of stride 1"):
            WinogradConv2d.of(layer if layer.stride == 2 else make(4))


@pytest.mark.parametrize("kind", ["sdxl"])
def test_a_laid_unet_with_the_prompt_ahead_agrees_with_diffusers(monkeypatch, kind):
    """At a size whose sides cannot be halved at every level, all wide convolutions transformed."""
    monkeypatch.setattr("eqxdiff.passes.conv.WINOGRAD_CHANNELS", 1)
    reference = read_reference()
    inputs, plain = read_inputs(reference, f"{kind}/odd"), unet(kind)
    laid = passes.lay_convolutions(plain, "cpu")
    assert any(
        isinstance(node, WinogradConv2d)
        for node in jax.tree.leaves(laid, is_leaf=lambda node: isinstance(node, WinogradConv2d))
    )

    @eqx.filter_jit
    def run(model, rest, inputs):
        added: AddedConditioning | None = added_of(inputs)
        return rest(inputs["x"], inputs["timestep"], model.keys(inputs["context"]), added)

    with compiled_fast():
        out = run(plain, laid.without_keys(), inputs)
    assert_agrees(out, reference, f"{kind}/odd/out")
