"""T5's encoder against transformers."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES, fake_tensor, read_manifest, relative_error
from jax.flatten_util import ravel_pytree

from eqxdiff._errors import CheckpointError, ConfigError
from eqxdiff.checkpoint import check, export_infos, load_module, read_table
from eqxdiff.tensors import InMemory
from eqxdiff.text import T5Config, T5Encoder
from eqxdiff.text.t5 import relative_buckets


KINDS = ("xxl", "narrow")


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "t5.npz") as file:
        return dict(file)


def skeleton(config: T5Config) -> T5Encoder:
    return eqx.filter_eval_shape(lambda: T5Encoder.init(config, key=jax.random.key(0)))


def fields(reference, kind: str) -> dict:
    return json.loads(str(reference[f"{kind}/config"]))


def tensors(reference, kind: str) -> dict[str, np.ndarray]:
    model = skeleton(T5Config.parse(fields(reference, kind)))
    gains = json.loads(str(reference["gains"]))
    tensors = {}
    for name, info in export_infos(model, read_table("t5")).items():
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        tensors[name] = np.float32(gain) * fake_tensor(name, info.shape)
    return tensors


def encoder(reference, kind: str, dtype=jnp.float32) -> T5Encoder:
    model = skeleton(T5Config.parse(fields(reference, kind)))
    return load_module(InMemory(tensors(reference, kind)), read_table("t5"), model, dtype=dtype)


@eqx.filter_jit
def encode(model: T5Encoder, tokens, dtype=None):
    return model(tokens, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoding_agrees_with_transformers(reference, kind):
    out = encode(encoder(reference, kind), jnp.asarray(reference["tokens"]))
    rounding = float(reference[f"{kind}/last_hidden_state/rounding"])
    assert relative_error(out, reference[f"{kind}/last_hidden_state"]) < max(5e-6, 5 * rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_equal_those_of_transformers(reference, kind):
    """At every distance up to 2000: a logarithm rounded otherwise would move an edge by one."""
    config = T5Config.parse(fields(reference, kind))
    settings = config.relative_attention_num_buckets, config.relative_attention_max_distance
    buckets = relative_buckets(2001, *settings)
    np.testing.assert_array_equal(buckets[0], reference[f"{kind}/buckets"][2000:])
    np.testing.assert_array_equal(buckets[-1], reference[f"{kind}/buckets"][:2001])


def test_buckets_depend_on_the_distance_alone():
    buckets = relative_buckets(40, 32, 128)
    for distance in (-39, -7, 0, 1, 20):
        assert len(set(np.diagonal(buckets, distance))) == 1


def test_another_prompt_moves_the_output(reference):
    """Else the reference could not see a mistake in what the prompt goes through."""
    model, tokens = encoder(reference, "xxl"), jnp.asarray(reference["tokens"])
    assert relative_error(encode(model, tokens), encode(model, tokens[::-1])) > 0.1


def test_bfloat16_errs_no_more_than_transformers(reference):
    """Against the same encoder in float32: ours at most 1.05 times theirs, medians of 8 inputs."""
    single, half = encoder(reference, "xxl"), encoder(reference, "xxl", jnp.bfloat16)
    errors = []
    for tokens in reference["bfloat16/tokens"]:
        out = encode(half, jnp.asarray(tokens))
        assert out.dtype == jnp.bfloat16
        errors.append(relative_error(out, encode(single, jnp.asarray(tokens))))
    ours, theirs = np.median(errors), np.median(reference["bfloat16"])
    assert ours <= 1.05 * theirs, f"ours {ours:.4f}, theirs {theirs:.4f}"


def test_activations_may_have_another_dtype_than_weights(reference):
    out = encode(
        encoder(reference, "xxl", jnp.bfloat16), jnp.asarray(reference["tokens"]), jnp.float32
    )
    assert out.dtype == jnp.float32
    assert 1e-4 < relative_error(out, reference["xxl/last_hidden_state"]) < 0.1


def test_gradients_do_not_depend_on_rematerialisation(reference):
    model, tokens = encoder(reference, "xxl"), jnp.asarray(reference["tokens"])[:30]

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(model, remat):
        return jnp.sum(model(tokens, remat=remat) ** 2)

    one, other = (ravel_pytree(grad(model, remat))[0] for remat in (False, True))
    assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("names", [["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]])
def test_the_embedding_may_have_either_name_or_both(reference, names):
    file = tensors(reference, "xxl")
    embedding = file.pop("shared.weight")
    file |= {f"{name}.weight": embedding for name in names}
    model = skeleton(T5Config.parse(fields(reference, "xxl")))
    loaded = load_module(InMemory(file), read_table("t5"), model)
    np.testing.assert_array_equal(loaded.shared.weight, embedding)


def test_two_embeddings_that_differ_are_an_error(reference):
    file = tensors(reference, "xxl")
    file["encoder.embed_tokens.weight"] = file["shared.weight"] + 1
    model = skeleton(T5Config.parse(fields(reference, "xxl")))
    with pytest.raises(CheckpointError, match=r"shared\.weight"):
        load_module(InMemory(file), read_table("t5"), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj: 'relu' is not supported"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn: 'gelu' is not supported"),
        ({"model_type": "umt5"}, "model_type: 'umt5' is not supported"),
        ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets: 30"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance: 8"),
        ({"quantization": "nf4"}, "quantization: an unknown field"),
    ],
)
def test_unsupported_configs_are_named(reference, change, message):
    with pytest.raises(ConfigError, match=message):
        T5Config.parse({**fields(reference, "xxl"), **change})


def test_a_config_without_a_feed_forward_means_the_first_version(reference):
    config = fields(reference, "xxl")
    del config["feed_forward_proj"]
    with pytest.raises(ConfigError, match="feed_forward_proj: 'relu' is not supported"):
        T5Config.parse(config)


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_full_size_maps_onto_the_published_tensors(embedding):
    config = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    model, table, manifest = skeleton(config), read_table("t5"), read_manifest("t5_xxl")
    assert len(manifest) == 220
    if embedding != "both":
        for name in {"shared.weight", "encoder.embed_tokens.weight"} - {embedding}:
            del manifest[name]
    check(manifest, table, model)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 4_762_310_656
    exported = {tensor: info.shape for tensor, info in export_infos(model, table).items()}
    manifest["shared.weight"] = manifest.pop("encoder.embed_tokens.weight", (32128, 4096))
    assert exported == manifest
