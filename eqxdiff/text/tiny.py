"""Tokenizers without a vocabulary worth the name, for tiny checkpoints."""

import json
from collections.abc import Mapping
from typing import Any


def clip_files(pad_token: str = "<|endoftext|>") -> Mapping[str, str]:
    """The files of a CLIP tokenizer of 514 tokens, bytes within and at the end of a word."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = list(_byte_characters())
    tokens = [*alphabet, *(f"{char}</w>" for char in alphabet), start, end]
    config = {
        "add_prefix_space": False,
        "bos_token": start,
        "do_lower_case": True,
        "eos_token": end,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad_token,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": end,
    }
    special = {name: config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}),
        "merges.txt": "#version: 0.2\n",
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }


def clip_config(**own: Any) -> Mapping[str, Any]:
    """The `config.json` of a CLIP encoder of three layers and 32 features, but for `own` fields."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 32,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "pad_token_id": 1,
        "projection_dim": 32,
        "torch_dtype": "float32",
        "transformers_version": "4.43.3",
        "vocab_size": 514,
        **own,
    }


def t5_files() -> Mapping[str, str]:
    """The files of a T5 tokenizer of 198 tokens: the printable ASCII characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0 - code / 1000) for code in range(ord("!"), ord("~") + 1)]
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = ["<pad>", "</s>", "<unk>", *extra]
    tokens = [piece for piece, _ in pieces] + extra[::-1]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokens.index(token), "content": token, **flags, "special": True}
            for token in sorted(special, key=tokens.index)
        ],
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        "pre_tokenizer": {**metaspace, "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {**metaspace, "split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [*pieces, *((token, 0.0) for token in extra[::-1])],
            "byte_fallback": False,
        },
    }
    config = {
        "additional_special_tokens": extra,
        "eos_token": "</s>",
        "extra_ids": 100,
        "model_max_length": 512,
        "pad_token": "<pad>",
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(
            {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, indent=2
        ),
    }


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE, printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
