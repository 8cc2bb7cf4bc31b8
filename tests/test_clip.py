"""CLIP's text encoder against transformers."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES, fake_tensor, read_manifest, relative_error
from jax.flatten_util import ravel_pytree

from eqxdiff._errors import ConfigError
from eqxdiff.checkpoint import check, export_infos, load_module, read_table
from eqxdiff.tensors import InMemory
from eqxdiff.text import CLIPTextConfig, CLIPTextModel


KINDS = ("openai", "openclip", "named_end")


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "clip.npz") as file:
        return dict(file)


def skeleton(config: CLIPTextConfig) -> CLIPTextModel:
    return eqx.filter_eval_shape(lambda: CLIPTextModel.init(config, key=jax.random.key(0)))


def encoder(reference, kind: str, dtype=jnp.float32, **changes) -> CLIPTextModel:
    model = skeleton(CLIPTextConfig.parse({**fields(reference, kind), **changes}))
    gains = json.loads(str(reference["gains"]))
    tensors = {}
    for name, info in export_infos(model, read_table("clip")).items():
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        tensors[name] = np.float32(gain) * fake_tensor(name, info.shape)
    return load_module(InMemory(tensors), read_table("clip"), model, dtype=dtype)


def fields(reference, kind: str) -> dict:
    return json.loads(str(reference[f"{kind}/config"]))


@eqx.filter_jit
def encode(model: CLIPTextModel, tokens, *, skip: int = 0, dtype=None):
    return model(tokens, skip=skip, dtype=dtype)


def bound(reference, name: str) -> float:
    return max(5e-6, 5 * float(reference[f"{name}/rounding"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["last_hidden_state", "pooled", "text_embeds"])
def test_outputs_agree_with_transformers(reference, kind, output):
    value = getattr(encode(encoder(reference, kind), jnp.asarray(reference["tokens"])), output)
    if kind == "openai" and output == "text_embeds":
        assert value is None
    else:
        expected = reference[f"{kind}/{output}"]
        assert relative_error(value, expected) < bound(reference, f"{kind}/{output}")


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_skip_counts_hidden_states_from_the_last(reference, skip):
    """`hidden_states[-1 - skip]` of transformers, the last of all being the embeddings."""
    out = encode(encoder(reference, "openclip"), jnp.asarray(reference["tokens"]), skip=skip)
    expected = reference["openclip/hidden_states"][-1 - skip]
    assert relative_error(out.hidden_state, expected) < bound(reference, "openclip/hidden_states")


def test_skip_changes_nothing_else(reference):
    model, tokens = encoder(reference, "openclip"), jnp.asarray(reference["tokens"])
    whole, skipped = encode(model, tokens), encode(model, tokens, skip=2)
    np.testing.assert_array_equal(whole.text_embeds, skipped.text_embeds)
    np.testing.assert_array_equal(whole.last_hidden_state, skipped.last_hidden_state)


def test_the_end_is_the_highest_id_or_the_first_end_token(reference):
    tokens = jnp.asarray(reference["tokens"])
    old, new = (encode(encoder(reference, kind), tokens) for kind in ("openai", "named_end"))
    np.testing.assert_array_equal(old.pooled, old.last_hidden_state[11])
    np.testing.assert_array_equal(new.pooled, new.last_hidden_state[9])


def test_later_tokens_do_not_reach_earlier_ones(reference):
    model, tokens = encoder(reference, "openai"), jnp.asarray(reference["tokens"])
    one = encode(model, tokens).last_hidden_state
    other = encode(model, tokens.at[12].set(7)).last_hidden_state
    np.testing.assert_array_equal(one[:12], other[:12])
    assert relative_error(one[12:], other[12:]) > 0.01


def test_another_prompt_moves_the_output(reference):
    """Else the reference could not see a mistake in what the prompt goes through."""
    model, tokens = encoder(reference, "openai"), jnp.asarray(reference["tokens"])
    assert relative_error(encode(model, tokens).pooled, encode(model, tokens[::-1]).pooled) > 0.1


def test_bfloat16_errs_no_more_than_transformers(reference):
    """Against the same encoder in float32: ours at most 1.05 times theirs, medians of 8 inputs."""
    single, half = encoder(reference, "openai"), encoder(reference, "openai", jnp.bfloat16)
    errors = []
    for tokens in reference["bfloat16/tokens"]:
        tokens = jnp.asarray(tokens)
        out = encode(half, tokens).last_hidden_state
        assert out.dtype == jnp.bfloat16
        errors.append(relative_error(out, encode(single, tokens).last_hidden_state))
    ours, theirs = np.median(errors), np.median(reference["bfloat16"])
    assert ours <= 1.05 * theirs, f"ours {ours:.4f}, theirs {theirs:.4f}"


def test_activations_may_have_another_dtype_than_weights(reference):
    tokens = jnp.asarray(reference["tokens"])
    half = encode(encoder(reference, "openclip", jnp.bfloat16), tokens, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.float32)}
    assert 1e-4 < relative_error(half.text_embeds, reference["openclip/text_embeds"]) < 0.1


def test_gradients_do_not_depend_on_rematerialisation(reference):
    model, tokens = encoder(reference, "openclip"), jnp.asarray(reference["tokens"])

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(model, remat):
        out = model(tokens, skip=1, remat=remat)
        return jnp.sum(out.hidden_state**2) + jnp.sum(out.pooled)

    one, other = (ravel_pytree(grad(model, remat))[0] for remat in (False, True))
    assert relative_error(one, other) < 1e-5


def test_too_many_tokens_or_too_few_layers_are_errors(reference):
    model = encoder(reference, "openai")
    with pytest.raises(ValueError, match="21 tokens are more than the 20 positions"):
        model(jnp.zeros(21, jnp.int32))
    with pytest.raises(ValueError, match="`skip` 4 is out of range: the encoder has 3 layers"):
        model(jnp.zeros(20, jnp.int32), skip=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported, only 'quick_gelu' or"),
        ({"architectures": ["CLIPModel"]}, r"architectures: \['CLIPModel'\] is not supported"),
        ({"model_type": "clip"}, "model_type: 'clip' is not supported"),
        ({"num_attention_heads": 5}, "hidden_size: 32 is not a multiple of num_attention_heads 5"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"vision": {}}, "vision: an unknown field"),
        ({"architectures": ["CLIPTextModelWithProjection"], "projection_dim": None}, "projection"),
    ],
)
def test_unsupported_configs_are_named(reference, change, message):
    with pytest.raises(ConfigError, match=message):
        CLIPTextConfig.parse({**fields(reference, "openai"), **change})


SIZES = {
    "clip_l": (768, 3072, 12, 12, "quick_gelu", "CLIPTextModel", 123_060_480),
    "clip_h": (1024, 4096, 23, 16, "gelu", "CLIPTextModel", 340_387_840),
    "clip_bigg": (1280, 5120, 32, 20, "gelu", "CLIPTextModelWithProjection", 694_659_840),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_maps_onto_the_published_tensors(name):
    """CLIP-L of Stable Diffusion 1, SDXL and FLUX.1; OpenCLIP's H of SD 2 and bigG of SDXL."""
    dim, hidden, layers, heads, act, architecture, parameters = SIZES[name]
    config = CLIPTextConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        projection_dim=dim,
        eos_token_id=2,
        architectures=(architecture,),
    )
    model, table, manifest = skeleton(config), read_table("clip"), read_manifest(name)
    check(manifest, table, model)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters
    exported = {tensor: info.shape for tensor, info in export_infos(model, table).items()}
    assert exported == {t: shape for t, shape in manifest.items() if "position_ids" not in t}


def test_current_transformers_spelling_maps_too():
    """Without the prefix that published files have."""
    config = CLIPTextConfig(768, 3072, 12, 12)
    manifest = read_manifest("clip_l")
    bare = {name.removeprefix("text_model."): shape for name, shape in manifest.items()}
    check(bare, read_table("clip"), skeleton(config))
