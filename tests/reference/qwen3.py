"""Records Qwen3 and its tokenizer of transformers: python tests/reference/qwen3.py

It writes qwen3.npz and qwen_merges.json.gz into tests/fixtures, and the manifests of the encoders.
"""

import gzip
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from _torch import FIXTURES, fake_tensor, write_manifest
from tokenizer_files import checksum, clip_vocab, nasty_prompts, qwen_vocab, write_qwen
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from eqxdiff.text import QWEN3, QWEN3_DIRECT


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 40960,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.56.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 60,
}
# States, queries and keys whose variance is like the epsilon of the norms, and sharp attention.
GAINS = {
    "embed_tokens": 0.003,
    "o_proj": 0.003,
    "down_proj": 0.003,
    "q_proj": 0.003,
    "k_proj": 0.003,
    "q_norm": 2.0,
    "k_norm": 1.5,
}
LENGTH = 23
SIZES = {"4b": (2560, 9728, 32, True), "8b": (4096, 12288, 32, False)}

# What Qwen3's own template does with the one message of a user.
TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""


def fill(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    state = model.state_dict()
    for name, value in state.items():
        gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
        fake = np.float32(gain) * fake_tensor(f"model.{name}", tuple(value.shape))
        state[name] = torch.from_numpy(fake)
    model.load_state_dict(state)
    return model.to(dtype).eval().requires_grad_(False)


def states(model, tokens: np.ndarray, length: int) -> torch.Tensor:
    """The hidden states, the embedding first, of tokens that are padded from `length` on."""
    mask = torch.arange(len(tokens))[None] < length
    ids = torch.from_numpy(tokens).long()[None]
    out = model(ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
    return torch.stack([state[0] for state in out.hidden_states])


def record_states() -> dict[str, np.ndarray]:
    make = lambda dtype: fill(transformers.Qwen3Model(transformers.Qwen3Config(**CONFIG)), dtype)
    tokens = np.random.RandomState(0).randint(0, 60, 512)
    single = states(make(torch.float32), tokens, LENGTH)
    double = states(make(torch.float64), tokens, LENGTH)
    config = transformers.models.qwen3_vl.Qwen3VLTextConfig(
        **{**CONFIG, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}
    )
    seeing = fill(transformers.models.qwen3_vl.Qwen3VLTextModel(config), torch.float32)
    assert torch.equal(states(seeing, tokens, LENGTH)[:-1], single[:-1])
    pairs = zip(single.double(), double, strict=True)
    rounding = [float((a - b).norm() / b.norm()) for a, b in pairs]
    print("rounding", [f"{value:.1e}" for value in rounding])
    return {
        "config": np.array(json.dumps(CONFIG)),
        "gains": np.array(json.dumps(GAINS)),
        "tokens": tokens.astype(np.int32),
        "length": np.array(LENGTH),
        "states": single.numpy()[:, ::3],  # every third token
        "rounding": np.array(rounding),
    }


def train() -> None:
    """Trains a byte-level vocabulary on words of CLIP's and on awkward prompts."""
    words = [word.removesuffix("</w>") for word in clip_vocab()[0] if word.isascii()]
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(4000)] + nasty_prompts()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2000, initial_alphabet=sorted(alphabet))
    backend.train_from_iterator(lines, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    data = json.dumps({"vocab": model["vocab"], "merges": merges}).encode()
    (FIXTURES / "qwen_merges.json.gz").write_bytes(gzip.compress(data, mtime=0))


def record_tokens() -> dict[str, np.ndarray]:
    """Checksums of the ids of each prompt alone, and in its chat, cut and padded to 64."""
    prompts, record = nasty_prompts(), {}
    assert len(qwen_vocab()[0]) == 2000
    with tempfile.TemporaryDirectory() as temporary:
        for whole in (True, False):
            folder = write_qwen(Path(temporary) / str(whole), whole=whole)
            tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder)
            tokenizer.chat_template = TEMPLATE
            ids = [tokenizer(prompt).input_ids for prompt in prompts]
            record[f"ids/{whole}"] = np.array([checksum(row) for row in ids], np.uint32)
            for name, chat in (("thinking", QWEN3), ("direct", QWEN3_DIRECT)):
                texts = [
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": prompt}],
                        tokenize=False,
                        add_generation_prompt=True,
                        enable_thinking=chat is QWEN3,
                    )
                    for prompt in prompts
                ]
                assert texts == [chat.head + prompt + chat.tail for prompt in prompts]
                cut = {"padding": "max_length", "truncation": True, "max_length": 64}
                rows = [tokenizer(text, **cut) for text in texts]
                sums = [checksum([*row.input_ids, sum(row.attention_mask)]) for row in rows]
                record[f"{name}/{whole}"] = np.array(sums, np.uint32)
    return record


def record_manifests() -> None:
    for kind, (dim, hidden, heads, tied) in SIZES.items():
        config = transformers.Qwen3Config(
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=36,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=tied,
        )
        with torch.device("meta"):
            state = transformers.Qwen3ForCausalLM(config).state_dict()
        if tied:  # the published file does not repeat it
            del state["lm_head.weight"]
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        write_manifest(f"qwen3_{kind}", shapes, layers="model.layers")


def main() -> None:
    transformers.logging.set_verbosity_error()
    train()
    np.savez_compressed(FIXTURES / "qwen3.npz", **record_states(), **record_tokens())
    record_manifests()


if __name__ == "__main__":
    main()
