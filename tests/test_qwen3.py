"""Qwen3's states and token ids against transformers."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES, count_compilations, fake_tensor, read_manifest, relative_error
from tokenizer_files import checksum, nasty_prompts, write_qwen

from eqxdiff._errors import ConfigError
from eqxdiff.checkpoint import check, export_infos, leaf_paths, load_module, read_table
from eqxdiff.sharding import logical_axes
from eqxdiff.tensors import InMemory
from eqxdiff.text import QWEN3, QWEN3_DIRECT, Qwen3Config, Qwen3Encoder, Tokenizer, rules


TAPS = (2, -2)
SIZES = {"4b": (2560, 9728), "8b": (4096, 12288)}


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "qwen3.npz") as file:
        return dict(file)


def fields(reference) -> dict:
    return json.loads(str(reference["config"]))


def skeleton(config: Qwen3Config) -> Qwen3Encoder:
    return eqx.filter_eval_shape(lambda: Qwen3Encoder.init(config, key=jax.random.key(0)))


def encoder(reference, taps=TAPS, dtype=jnp.float32) -> Qwen3Encoder:
    model, table = skeleton(Qwen3Config.parse(fields(reference), taps=taps)), read_table("qwen3")
    gains = json.loads(str(reference["gains"]))
    tensors = {}
    for name, info in export_infos(model, table).items():
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        tensors[name] = np.float32(gain) * fake_tensor(name, info.shape)
    return load_module(InMemory(tensors), table, model, dtype=dtype)


@eqx.filter_jit
def encode(model: Qwen3Encoder, tokens, length, dtype=None):
    return model(tokens, length, dtype=dtype)


def check_states(reference, taps=TAPS) -> None:
    """The states at the taps, side by side, padding included."""
    tokens, length = jnp.asarray(reference["tokens"]), jnp.asarray(reference["length"])
    out = encode(encoder(reference, taps), tokens, length)
    levels = [tap if tap > 0 else 6 + tap for tap in taps]
    want = np.concatenate([reference["states"][level] for level in levels], axis=-1)
    rounding = max(reference["rounding"][level] for level in levels)
    assert relative_error(out[::3], want) < max(5e-6, 5 * rounding)


@pytest.mark.parametrize("taps", [TAPS, (3, 1)], ids=str)
def test_states_agree_with_transformers(reference, taps):
    check_states(reference, taps)


def test_the_prompt_and_its_length_move_the_states_and_compile_nothing(reference):
    model, tokens = encoder(reference), jnp.asarray(reference["tokens"])
    out, length = encode(model, tokens, jnp.asarray(23)), jnp.asarray(24)
    with count_compilations() as compiled:
        longer = encode(model, tokens, length)
    assert not compiled
    np.testing.assert_array_equal(out[:23], longer[:23])
    assert relative_error(out[24:], longer[24:]) > 1e-3
    assert relative_error(out[:20], encode(model, tokens[::-1], jnp.asarray(23))[:20]) > 0.1


def test_activations_may_have_another_dtype_than_weights(reference):
    tokens, length = jnp.asarray(reference["tokens"]), jnp.asarray(reference["length"])
    wide = encode(encoder(reference), tokens, length)
    out = encode(encoder(reference, dtype=jnp.bfloat16), tokens, length, jnp.float32)
    assert out.dtype == jnp.float32
    assert 1e-4 < relative_error(out, wide) < 0.1


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(("taps", "depth"), [((9, 18, 27), 27), ((-2,), 35)])
@pytest.mark.parametrize("prefix", ["model", "model.language_model"])
def test_full_size_maps_onto_the_published_tensors(kind, taps, depth, prefix):
    """All layers that are read are loaded; the others, the last norm and the head are dropped."""
    dim, hidden = SIZES[kind]
    model = skeleton(Qwen3Config(dim, hidden, 36, 32, 8, taps))
    manifest = read_manifest(f"qwen3_{kind}")
    file = {name.replace("model", prefix, 1): shape for name, shape in manifest.items()}
    if prefix != "model":
        file["model.visual.patch_embed.proj.weight"] = (1152, 3, 2, 16, 16)
    check(file, read_table("qwen3"), model)
    exported = {name: info.shape for name, info in export_infos(model, read_table("qwen3")).items()}
    assert exported.items() <= manifest.items()
    assert len(exported) == 1 + 11 * depth
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert size == {("4b", 27): 3_114_088_192}.get((kind, depth), size)
    for path, leaf in leaf_paths(model).items():
        logical_axes(path, leaf.ndim, rules.QWEN3)


def test_the_config_of_qwen3_vl_holds_that_of_its_text(reference):
    text = {**fields(reference), "model_type": "qwen3_vl_text"}
    del text["rope_theta"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [1]}
    config = Qwen3Config.parse({"model_type": "qwen3_vl", "text_config": text}, taps=(1,))
    assert (config.rope_theta, config.depth) == (5e6, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type: 'yarn' is not supported"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types: .* is not supported"),
        ({"num_key_value_heads": 4}, "num_attention_heads: 6 is not a multiple"),
        ({"head_dim": 15}, "head_dim: 15 is not even"),
        ({"num_hidden_layers": 4}, "num_hidden_layers: 4 is not above 4, the number of layers"),
        ({"quantization": "nf4"}, "quantization: an unknown field"),
    ],
)
def test_unsupported_configs_are_named(reference, change, message):
    with pytest.raises(ConfigError, match=message):
        Qwen3Config.parse({**fields(reference), **change}, taps=(4,))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen")
    return {w: Tokenizer.load(write_qwen(root / str(w), whole=w)) for w in (True, False)}


@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_ids_of_awkward_prompts_equal_those_of_transformers(reference, tokenizers, whole):
    """Alone, and cut and padded to 64 in the chats with thinking on and off."""
    tokenizer, wrong = tokenizers[whole], []
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (2005, 2000)
    for index, prompt in enumerate(nasty_prompts()):
        alone = tokenizer.encode(prompt, 1000)
        ids = {"ids": alone.ids[: alone.length]}
        for name, chat in (("thinking", QWEN3), ("direct", QWEN3_DIRECT)):
            tokens = chat.encode(tokenizer, prompt, 64)
            ids[name] = [*tokens.ids, tokens.length]
        for name, row in ids.items():
            if checksum(row) != reference[f"{name}/{whole}"][index]:
                wrong.append((name, prompt))
    assert not wrong


def test_what_is_dropped_is_the_end_of_the_prompt_and_not_of_the_chat(tokenizers):
    encode = lambda prompt, length: QWEN3_DIRECT.encode(tokenizers[True], prompt, length)
    whole = encode("one two", 100)
    assert whole.dropped == ""
    for length in range(whole.length - 8, whole.length):  # the tail of the template alone
        assert encode("one two", length).dropped == ""
    cut = encode("a word " * 90 + "and the end ", 64)
    assert (cut.length, cut.dropped.endswith("a word and the end")) == (64, True)
