"""FLUX.1 against diffusers: the transformer, tensor by tensor and number by number."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES, fake_tensor, read_manifest, relative_error

from eqxdiff.checkpoint import check, export_infos, load_module, read_table
from eqxdiff.models.flux1 import Transformer, TransformerConfig, patchify, positions, unpatchify
from eqxdiff.models.flux1.layers import modulate
from eqxdiff.tensors import InMemory


CONFIG = TransformerConfig(
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    joint_attention_dim=24,
    num_attention_heads=3,
    num_layers=2,
    num_single_layers=3,
    pooled_projection_dim=20,
)
SHAPES = {"square": (4, 4), "wide": (2, 7), "batch": (3, 5)}


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "flux1.npz") as file:
        return dict(file)


def transformer(kind: str, dtype=jnp.float32) -> Transformer:
    config = TransformerConfig(**{**vars(CONFIG), "guidance_embeds": kind == "dev"})
    table = read_table("flux1_transformer")
    skeleton = eqx.filter_eval_shape(lambda: Transformer.init(config, key=jax.random.key(0)))
    tensors = {
        name: fake_tensor(name, i.shape) for name, i in export_infos(skeleton, table).items()
    }
    return load_module(InMemory(tensors), table, skeleton, dtype=dtype)


@eqx.filter_jit
def apply(model, x, h: int, w: int, dtype):
    pe = positions(x["txt"].shape[1], 2 * h, 2 * w)

    def one(x):
        guidance = x["guidance"] if model.time_text_embed.guidance_embedder is not None else None
        cast = lambda name: x[name].astype(dtype)
        timestep = 1000 * x["timestep"]
        return model(cast("img"), cast("txt"), cast("pooled"), timestep, guidance, pe)

    return jax.vmap(one)(x)


def read_inputs(reference, prefix: str):
    names = ("img", "txt", "pooled", "timestep", "guidance")
    return {name: jnp.asarray(reference[f"{prefix}/{name}"]) for name in names}


@pytest.mark.parametrize("kind", ["dev", "schnell"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformer_agrees_with_diffusers(reference, kind, shape):
    x = read_inputs(reference, shape)
    out = apply(transformer(kind), x, *SHAPES[shape], jnp.float32)
    bound = max(5e-6, 5 * reference[f"{kind}/{shape}/rounding"])
    assert relative_error(out, reference[f"{kind}/{shape}/out"]) < bound


def test_norms_have_the_epsilons_of_diffusers(reference):
    """On inputs of variance 1e-6, as large as the epsilon itself."""
    norms = {name: reference[f"norms/{name}"] for name in ("x", "heads", "vec")}
    x, heads, vec = (jnp.asarray(value) for value in norms.values())
    model = transformer("dev")
    first = lambda blocks: jax.tree.map(lambda leaf: leaf[0], blocks)
    double, single = first(model.transformer_blocks), first(model.single_transformer_blocks)
    scale, shift = model.norm_out(vec)
    ours = {
        "norm1": modulate(x, *double.norm1(vec)[:2]),
        "norm": modulate(x, *single.norm(vec)[:2]),
        "norm_out": modulate(x, shift, scale),
        "norm_q": double.attn.norm_q(heads),
        "norm_added_k": double.attn.norm_added_k(heads),
        "single_norm_k": single.attn.norm_k(heads),
    }
    for name, value in ours.items():
        assert relative_error(value, reference[f"norms/{name}"]) < 5e-6, name


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_bfloat16_errs_no_more_than_diffusers(reference, kind):
    """Against the same module in float32: ours at most 1.05 times theirs, medians of 8 inputs."""
    model, errors = transformer(kind), []
    for seed in range(8):
        x = read_inputs(reference, f"bfloat16/{seed}")
        single = apply(model, x, 4, 4, jnp.float32)
        half = apply(transformer(kind, jnp.bfloat16), x, 4, 4, jnp.bfloat16)
        errors.append(relative_error(half.astype(jnp.float32), single))
    ours, theirs = np.median(errors), np.median(reference[f"{kind}/bfloat16"])
    assert ours <= 1.05 * theirs, f"ours {ours:.4f}, theirs {theirs:.4f}"


def test_another_prompt_moves_the_output(reference):
    """Else the reference could not see a mistake in what the prompt goes through."""
    x = read_inputs(reference, "square")
    model = transformer("dev")
    other = {**x, "txt": x["txt"][:, ::-1], "pooled": -x["pooled"]}
    a, b = (apply(model, prompt, 4, 4, jnp.float32) for prompt in (x, other))
    assert relative_error(a, b) > 0.1


def test_patches_are_channel_row_column():
    x = jnp.arange(4 * 6 * 3, dtype=jnp.float32).reshape(4, 6, 3)
    patches = patchify(x)
    assert patches.shape == (6, 12)
    # The patch in row 1 and column 2, channel 1: its four pixels, row by row.
    assert patches[5, 4:8].tolist() == x[2:4, 4:6, 1].reshape(-1).tolist()
    assert jnp.array_equal(unpatchify(patches, 4, 6), x)


@pytest.mark.parametrize(
    ("kind", "parameters"), [("dev", 11_901_408_320), ("schnell", 11_891_178_560)]
)
def test_full_size_maps_completely(kind, parameters):
    config = TransformerConfig(guidance_embeds=kind == "dev")
    skeleton = eqx.filter_eval_shape(lambda: Transformer.init(config, key=jax.random.key(0)))
    manifest = read_manifest(f"flux1_{kind}")
    table = read_table("flux1_transformer")
    check(manifest, table, skeleton)
    exported = {name: info.shape for name, info in export_infos(skeleton, table).items()}
    assert exported == manifest
    assert sum(leaf.size for leaf in jax.tree.leaves(skeleton)) == parameters
