"""What holds for every network: its projections are called alone, and its blocks can be watched."""

import ast
import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_module, relative_error

import eqxdiff
from eqxdiff.models.flux1 import Transformer, TransformerConfig
from eqxdiff.models.flux1.layers import modulate
from eqxdiff.models.unet.config import UNetConfig
from eqxdiff.models.unet.controlnet import ControlNet, ControlNetConfig
from eqxdiff.models.unet.network import AddedConditioning, UNet
from eqxdiff.nn import (
    AbstractConv2d,
    AbstractLinear,
    Adapted,
    Conv2d,
    Linear,
    everything,
    fold,
    rope,
    stack,
)
from eqxdiff.text import CLIPTextConfig, CLIPTextModel, T5Config, T5Encoder
from eqxdiff.vae import AutoencoderKL, AutoencoderKLConfig, decode_tiled, encode_tiled


FLUX = TransformerConfig(
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)
CLIP = CLIPTextConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    vocab_size=50,
    max_position_embeddings=9,
    projection_dim=6,
    architectures=("CLIPTextModelWithProjection",),
)
T5 = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=2, vocab_size=50)
UNET = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=12,
    transformer_layers_per_block=2,
    norm_num_groups=4,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=5 + 6 * 4,
    time_cond_proj_dim=6,
)
VAE = AutoencoderKLConfig(block_out_channels=(8, 8), norm_num_groups=4)


def normal(*shape: int):
    return jnp.asarray(np.random.RandomState(sum(shape)).standard_normal(shape), jnp.float32)


TOKENS = jnp.asarray([3, 1, 4, 1, 49], jnp.int32)
POSITIONS = jnp.asarray(np.arange(33).reshape(11, 3) % 5, jnp.float32)
STREAMS = normal(6, 8), normal(5, 12), normal(10), jnp.float32(500), jnp.float32(3.5), POSITIONS
ADDED = AddedConditioning(normal(5), jnp.arange(6.0))
DENOISED = normal(4, 6, 4), jnp.float32(500), normal(7, 12)
CONTROL = ControlNetConfig(UNET, conditioning_embedding_out_channels=(4, 8))
# A class, its config, and a function of the network.
NETWORKS = {
    "flux": (Transformer, FLUX, lambda net: net(*STREAMS)),
    "clip": (CLIPTextModel, CLIP, lambda net: net(TOKENS, skip=1)),
    "t5": (T5Encoder, T5, lambda net: net(TOKENS)),
    "unet": (UNet, UNET, lambda net: net(*DENOISED, ADDED, guidance=jnp.float32(4))),
    "controlnet": (
        ControlNet,
        CONTROL,
        lambda net: net(*DENOISED, normal(8, 12, 3), ADDED, scale=jnp.float32(1)),
    ),
    "vae": (
        AutoencoderKL,
        VAE,
        lambda net: [net.decode(normal(4, 6, 4)), net.encode(normal(8, 12, 3))],
    ),
    "vae in tiles": (
        AutoencoderKL,
        VAE,
        lambda net: [
            decode_tiled(net, normal(4, 6, 4), tile=4, overlap=2),
            encode_tiled(net, normal(8, 12, 3), tile=4, overlap=2),
        ],
    ),
}


def make(name: str):
    cls, cfg, call = NETWORKS[name]
    if name == "controlnet":  # it embeds no guidance scale
        unet = UNetConfig(**{**vars(UNET), "time_cond_proj_dim": None})
        cfg = ControlNetConfig(unet, conditioning_embedding_out_channels=(4, 8))
    return fake_module(cls.init, cfg), call


class OpaqueLinear(AbstractLinear):
    """A projection of which nothing but the call is known, as of a quantised one."""

    hidden: Linear

    def __call__(self, x):
        return self.hidden(x)


class OpaqueConv2d(AbstractConv2d):
    """A convolution of which nothing but the call is known."""

    hidden: Conv2d

    def __call__(self, x):
        return self.hidden(x)


def is_layer(node) -> bool:
    return isinstance(node, Linear | Conv2d)


def hide(node):
    if not is_layer(node):
        return node
    return OpaqueLinear(node) if isinstance(node, Linear) else OpaqueConv2d(node)


def trace(network, call):
    """The program of a network, with its arrays as arguments."""
    arrays, static = eqx.partition(network, eqx.is_array)
    return jax.make_jaxpr(lambda arrays: call(eqx.combine(arrays, static)))(arrays)


@pytest.mark.parametrize("name", NETWORKS)
def test_other_layers_stand_in_for_every_projection(name, monkeypatch):
    """Each linear layer and convolution is called and no more; adapters stand in for all too."""
    joined = lambda layer, *parts: layer(jnp.concatenate(parts, axis=-1))
    monkeypatch.setattr("eqxdiff.models.flux1.network.side_by_side", joined)
    network, call = make(name)
    wanted = trace(network, call)
    opaque = trace(jax.tree.map(hide, network, is_leaf=is_layer), call)
    assert str(opaque) == str(wanted)

    def adapt(node):
        if not is_layer(node):
            return node
        lead = node.weight.ndim - (4 if isinstance(node, Conv2d) else 2)
        layers, (out, *inputs) = node.weight.shape[:lead], node.weight.shape[lead:]
        down = jnp.ones((*layers, 1, 1, int(np.prod(inputs))))
        return Adapted(node, jnp.zeros((*layers, 1)), down, jnp.ones((*layers, out, 1, 1)))

    adapted = trace(jax.tree.map(adapt, network, is_leaf=is_layer), call)
    assert adapted.out_avals == wanted.out_avals
    assert len(str(adapted)) > len(str(wanted))


def test_nothing_outside_nn_reads_a_weight():
    """But for the rooms that make other forms of weights: elsewhere a layer may have none."""
    package = Path(eqxdiff.__file__).parent
    found = [
        f"{path.relative_to(package.parent)}:{node.lineno}"
        for path in [*package.rglob("*.py"), *(package.parent / "cli").rglob("*.py")]
        if path.relative_to(package.parent).parts[1] not in ("nn", "lora", "passes", "plan")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "weight"
    ]
    assert found == []


def blocks_of(stacked):
    """The blocks of a stack, one by one."""
    depth = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)]


@eqx.filter_jit
def capture(network, *args, **kwargs):
    return network.capture(*args, **kwargs)


def assert_same(seen, wanted):
    """What was captured, against a list of what blocks put out one by one."""
    wanted = jax.tree.map(lambda *xs: jnp.stack(xs), *wanted)
    for one, two in zip(jax.tree.leaves(seen), jax.tree.leaves(wanted), strict=True):
        assert relative_error(one, two) < 2e-6


@pytest.mark.parametrize("remat", [False, True])
def test_every_block_of_flux_can_be_captured(remat):
    network, _ = make("flux")
    network = dataclasses.replace(network, remat=remat)
    velocity, seen = capture(network, *STREAMS)
    img, txt = network.x_embedder(STREAMS[0]), network.context_embedder(STREAMS[1])
    vec = network.time_text_embed(STREAMS[3], STREAMS[4], STREAMS[2])
    pe = rope(STREAMS[5], network.axes_dims_rope, theta=10000.0)
    double, single = [(img, txt)], []
    for block in blocks_of(network.transformer_blocks):
        double.append(block(*double[-1], vec, pe))
    single = [jnp.concatenate(double[-1][::-1])]
    for block in blocks_of(network.single_transformer_blocks):
        single.append(block(single[-1], vec, pe))
    assert_same(seen.double, double[1:])
    assert_same(seen.single, single[1:])
    scale, shift = network.norm_out(vec)
    last = network.proj_out(modulate(single[-1][txt.shape[0] :], shift, scale))
    assert relative_error(velocity, last) < 2e-6


def test_every_layer_of_clip_can_be_captured():
    network, _ = make("clip")
    output, seen = capture(network, TOKENS, skip=1)
    states, mask = [network.embeddings(TOKENS, None)], jnp.tri(len(TOKENS), dtype=bool)[None]
    for layer in blocks_of(network.encoder.layers):
        states.append(layer(states[-1], mask))
    assert_same(seen, states[1:])
    assert_same([output.hidden_state[None]], [[states[-2]]])


def test_every_block_of_t5_can_be_captured():
    network, _ = make("t5")
    _, seen = capture(network, TOKENS)
    assert seen.shape == (3, 5, 16)
    one_by_one = []
    for depth in range(1, 4):  # an encoder of the first blocks alone, without its last norm
        blocks = jax.tree.map(lambda x, depth=depth: x[:depth], network.block)
        where = lambda net: (net.block, net.final_layer_norm)
        one_by_one.append(eqx.tree_at(where, network, (blocks, everything))(TOKENS))
    assert_same(seen, one_by_one)


def test_every_level_of_a_unet_can_be_captured():
    network, _ = make("unet")
    output, seen = capture(network, *DENOISED, ADDED, guidance=jnp.float32(4))
    assert [x.shape for x in seen.down] == [(4, 6, 8), (4, 6, 8), (2, 3, 8), (2, 3, 16)]
    assert relative_error(seen.down[0], network.conv_in(DENOISED[0])) < 2e-6
    assert seen.mid.shape == (2, 3, 16)
    assert [x.shape for x in seen.up] == [(4, 6, 16), (4, 6, 8)]
    last = network.conv_out(jax.nn.silu(network.conv_norm_out(seen.up[-1])))
    assert relative_error(last, output) < 2e-6


def test_what_is_kept_of_a_block_may_be_computed():
    """Mapped over a batch, and differentiated through."""
    network, _ = make("t5")

    @jax.jit
    @jax.vmap
    def means(tokens):
        return network.capture(tokens, keep=lambda x: jnp.mean(x, axis=0))[1]

    seen = means(jnp.stack([TOKENS, TOKENS[::-1]]))
    assert seen.shape == (2, 3, 16)
    for one, tokens in zip(seen, (TOKENS, TOKENS[::-1]), strict=True):
        assert relative_error(one, capture(network, tokens)[1].mean(axis=1)) < 2e-6

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(network):
        return jnp.sum(network.capture(TOKENS)[1][1] ** 2)

    by_block = jnp.any(grad(network).block.mlp.wo.weight != 0, axis=(1, 2))
    assert by_block.tolist() == [True, True, False]  # the last block comes after what was kept


@pytest.mark.parametrize("remat", [False, True])
def test_fold_returns_what_each_block_put_out(remat):
    layers = stack(lambda key: Linear.init(4, 4, key=key), 3, key=jax.random.key(0))
    apply = lambda layer, x: x + layer(x)
    x = normal(4)
    last, nothing = fold(layers, x, apply, remat=remat)
    assert nothing is None
    end, seen = fold(layers, x, apply, remat=remat, keep=everything)
    states = [x]
    for layer in blocks_of(layers):
        states.append(apply(layer, states[-1]))
    assert_same(seen, states[1:])
    assert jnp.array_equal(last, end)
    assert jnp.array_equal(seen[-1], end)
