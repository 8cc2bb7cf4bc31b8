"""Records what the text encoders and tokenizers of transformers compute.

Run `python tests/reference/text.py`, which needs protobuf besides transformers and sentencepiece.
It writes clip.npz, t5.npz and tokens.json.gz into tests/fixtures, and the manifests of the text
encoders. With `--vocabularies FILE`, where FILE is OpenAI's bpe_simple_vocab_16e6.txt.gz, it first
makes clip_merges.txt.gz and t5_spiece.model.gz.
"""

import argparse
import gzip
import io
import json
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
from _torch import FIXTURES, fake_tensor
from tokenizer_files import FOLDERS, clip_vocab
from transformers.models.t5.modeling_t5 import T5Attention


CLIP = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 20,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "projection_dim": 24,
    "torch_dtype": "float32",
    "transformers_version": "4.43.3",
    "vocab_size": 60,
}
PROJECTED = {"architectures": ["CLIPTextModelWithProjection"]}
CLIPS = {
    "openai": CLIP,
    "openclip": {**CLIP, **PROJECTED, "hidden_act": "gelu"},
    "named_end": {**CLIP, **PROJECTED, "eos_token_id": 57},
}
T5 = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 48,
    "d_kv": 8,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 3,
    "num_heads": 6,
    "num_layers": 3,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 60,
}
T5S = {
    "xxl": T5,
    "narrow": {**T5, "relative_attention_max_distance": 20, "relative_attention_num_buckets": 8},
}
# Small residuals, whose variance is like the epsilon of the norms, and sharp attention.
CLIP_GAINS = {"embedding": 0.02, "out_proj": 0.02, "fc2": 0.02, "q_proj": 2.0, "k_proj": 2.0}
T5_GAINS = {
    "shared": 0.006,
    "SelfAttention.o": 0.003,
    "DenseReluDense.wo": 0.003,
    "relative_attention_bias": 4.0,
    "SelfAttention.q": 1.2,
    "SelfAttention.k": 1.2,
}
PROMPTS = [
    "a photo of a cat",
    "Ünïcödé Café naïve",
    "Cafe\u0301 na\u0308ive \u212b",
    "a\u0301\u0301\u0301 zalgo h̷e̷l̷l̷o̷",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 ❤️ 🇩🇪🇫🇷 \U0001f9d1\U0001f3fd\u200d\U0001f680",
    "一只猫在月亮上",
    "漢字 かな カタカナ ｶﾀｶﾅ",
    "العَرَبِيَّة صورة قطة",
    "a   cat   with    blanks",
    " leading and trailing  ",
    "tab\there\nnewline\r\nend",
    "&amp; &lt;b&gt; &#39;x&#39; &amp;amp;",
    "",
    " ",
    "   \t\n ",
    "<|endoftext|> in the middle <|startoftext|>",
    "foo<|ENDOFTEXT|>bar <|StartOfText|>",
    "</s> end </s>and<pad><unk> <s>",
    "<extra_id_0> a <extra_id_99>b <extra_id_100>",
    "12345 3.14159 1,000 ½ ² ٣ Ⅷ ①",
    "don't it's WE'LL I'd they've y'all 'tis rock’n’roll",
    "snake_case __init__ a_b-c",
    "\x00\x01 control \x07 chars \x7f\x85 \u200b zero \u00ad soft",
    "wow!!! hey ! no!",
    "a ▁ b ▁▁c",
    "\u2028line\u2029para\u3000ideo\u00a0nbsp\u2003em\u1680og",
    "İstanbul ǅ ß ẞ ﬁ ﬃ ŉ Σίσυφος",
    "\ufeffbom \ufffd ﷺ ㍿",
    "(masterpiece:1.2), [blurry|sharp], {red}, <lora:x:0.8>, \\escaped\\",
    "x" * 300,
    "supercalifragilisticexpialidocious " * 30,
    "a very long prompt, " * 200,
]


def fill(model: torch.nn.Module, prefix: str, gains: dict[str, float]) -> torch.nn.Module:
    """Our deterministic weights under their published names."""
    state = model.state_dict()
    for name, value in state.items():
        name, key = name.replace("encoder.embed_tokens", "shared"), name  # which are tied
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        fake = np.float32(gain) * fake_tensor(prefix + name, tuple(value.shape))
        state[key] = torch.from_numpy(fake)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm())


def clip_tokens(rng: np.random.RandomState) -> np.ndarray:
    """Start, words among which are 2 and 57, end twice, and the highest id in the midst."""
    tokens = rng.randint(3, 56, 20)
    tokens[[0, 4, 9, 11, 15]] = 58, 2, 57, 59, 57
    tokens[16:] = 0
    return tokens


def run_clip(config: dict, tokens: np.ndarray, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    projected = config["architectures"] == ["CLIPTextModelWithProjection"]
    kind = getattr(transformers, config["architectures"][0])
    model = kind(transformers.CLIPTextConfig(**config)).to(dtype)
    fill(model, "" if projected else "text_model.", CLIP_GAINS)
    ids = torch.from_numpy(tokens).long()[None]
    out = (model.text_model if projected else model)(ids, output_hidden_states=True)
    result = {
        "last_hidden_state": out.last_hidden_state[0],
        "hidden_states": torch.stack([state[0] for state in out.hidden_states]),
        "pooled": out.pooler_output[0],
    }
    return result | ({"text_embeds": model(ids).text_embeds[0]} if projected else {})


def record_clip() -> dict[str, np.ndarray]:
    tokens = clip_tokens(np.random.RandomState(0))
    record = {"tokens": tokens.astype(np.int32), "gains": np.array(json.dumps(CLIP_GAINS))}
    for name, config in CLIPS.items():
        record[f"{name}/config"] = np.array(json.dumps(config))
        single = run_clip(config, tokens, torch.float32)
        double = run_clip(config, tokens, torch.float64)
        for output, value in single.items():
            record[f"{name}/{output}"] = value.numpy()
            record[f"{name}/{output}/rounding"] = np.array(difference(value, double[output]))
    last = lambda tokens, dtype: run_clip(CLIP, tokens, dtype)["last_hidden_state"]
    return record | record_half("clip", last, clip_tokens)


def run_t5(config: dict, tokens: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    model = transformers.T5EncoderModel(transformers.T5Config(**config)).to(dtype)
    fill(model, "", T5_GAINS)
    return model(torch.from_numpy(tokens).long()[None]).last_hidden_state[0]


def record_t5() -> dict[str, np.ndarray]:
    draw = lambda rng: rng.randint(0, 60, 150)
    tokens = draw(np.random.RandomState(0))
    record = {"tokens": tokens.astype(np.int32), "gains": np.array(json.dumps(T5_GAINS))}
    for name, config in T5S.items():
        record[f"{name}/config"] = np.array(json.dumps(config))
        single, double = (run_t5(config, tokens, dtype) for dtype in (torch.float32, torch.float64))
        record[f"{name}/last_hidden_state"] = single.numpy()
        record[f"{name}/last_hidden_state/rounding"] = np.array(difference(single, double))
        buckets = T5Attention._relative_position_bucket(
            torch.arange(-2000, 2001),
            num_buckets=config["relative_attention_num_buckets"],
            max_distance=config["relative_attention_max_distance"],
        )
        record[f"{name}/buckets"] = buckets.numpy().astype(np.int32)
    return record | record_half("t5", lambda t, dtype: run_t5(T5, t, dtype), draw)


def record_half(name: str, run, draw) -> dict[str, np.ndarray]:
    """The error of bfloat16 against the float32 run, for eight inputs."""
    inputs = [draw(np.random.RandomState(100 + seed)) for seed in range(8)]
    errors = [difference(run(t, torch.bfloat16), run(t, torch.float32)) for t in inputs]
    print(f"{name}: bfloat16 errs by {np.median(errors):.4f}")
    return {"bfloat16/tokens": np.stack(inputs).astype(np.int32), "bfloat16": np.array(errors)}


def record_tokens() -> dict:
    """The ids of each prompt, cut to 77 (CLIP) or 64 (T5), without the padding at the end."""
    record = {"prompts": PROMPTS, "ids": {}, "pad": {}, "length": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, write in FOLDERS.items():
            folder = write(Path(temporary) / kind)
            t5 = kind.startswith("t5")
            family = transformers.T5Tokenizer if t5 else transformers.CLIPTokenizer
            tokenizer = family.from_pretrained(folder)
            length = 64 if t5 else 77
            settings = {"max_length": length, "truncation": True}
            ids = [tokenizer(prompt, **settings).input_ids for prompt in PROMPTS]
            padded = tokenizer(PROMPTS, padding="max_length", **settings).input_ids
            pad = tokenizer.pad_token_id
            assert padded == [row + [pad] * (length - len(row)) for row in ids]
            record["ids"][kind], record["pad"][kind], record["length"][kind] = ids, pad, length
    return record


def make_vocabularies(source: Path) -> None:
    lines = gzip.decompress(source.read_bytes()).decode().splitlines()
    merges = "\n".join(lines[1 : 49152 - 256 - 2 + 1])
    write_gzip("clip_merges.txt.gz", merges.encode())
    # T5's own training data is not ours to ship; the words of CLIP's vocabulary will do.
    vocab, _ = clip_vocab()
    letters = [token for token in vocab if len(token) == 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    byte = dict(zip(letters, order, strict=True))
    words = []
    for token in vocab:
        if token.endswith("</w>"):
            try:
                words.append(bytes(byte[letter] for letter in token[:-4]).decode())
            except UnicodeDecodeError:
                continue
    rng = random.Random(0)
    words += [rng.choice([word.title(), word.upper()]) for word in words[::4]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choices(words, k=12)) for _ in range(4000)),
        model_writer=model,
        vocab_size=1000,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        character_coverage=0.995,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    write_gzip("t5_spiece.model.gz", model.getvalue())


def record_manifests() -> None:
    """The tensors of the published checkpoints, full-size.

    transformers 5 writes no `text_model.` where published files of `CLIPTextModel` have it, and
    the oldest of these, those of Stable Diffusion 1, also hold `position_ids`.
    """
    sizes = lambda dim, hidden, layers, heads: {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": dim,
    }
    with torch.device("meta"):
        large = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes(768, 3072, 12, 12)))
        huge = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes(1024, 4096, 23, 16)))
        giant = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**sizes(1280, 5120, 32, 20))
        )
        config = transformers.T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
        xxl = transformers.T5EncoderModel(config)
    shapes = lambda model, prefix="": {
        prefix + name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    positions = {"text_model.embeddings.position_ids": (1, 77)}
    write_manifest("clip_l", positions | shapes(large, "text_model."), 12)
    write_manifest("clip_h", positions | shapes(huge, "text_model."), 23)
    write_manifest("clip_bigg", shapes(giant), 32)
    write_manifest("t5_xxl", shapes(xxl), 24)


def write_manifest(name: str, shapes: dict[str, tuple[int, ...]], layers: int) -> None:
    """One line for each name, or for the `layers` names that differ by a number alone."""
    lines = {}
    for tensor, shape in shapes.items():
        text = " ".join(map(str, shape))
        first = re.sub(r"(layers|block)\.\d+\.", r"\1.0.", tensor)
        last = first.replace(".0.", f".{layers - 1}.", 1)
        if first != last and shapes.get(last) == shape:
            tensor = first.replace(".0.", f".{{0..{layers - 1}}}.", 1)
        lines[f"{tensor} {text}\n"] = None
    (FIXTURES.parent / "manifests" / f"{name}.txt").write_text("".join(lines))


def write_gzip(name: str, data: bytes) -> None:
    (FIXTURES / name).write_bytes(gzip.compress(data, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabularies", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.vocabularies is not None:
        make_vocabularies(arguments.vocabularies)
    np.savez_compressed(FIXTURES / "clip.npz", **record_clip())
    np.savez_compressed(FIXTURES / "t5.npz", **record_t5())
    write_gzip("tokens.json.gz", json.dumps(record_tokens()).encode())
    record_manifests()


if __name__ == "__main__":
    main()
