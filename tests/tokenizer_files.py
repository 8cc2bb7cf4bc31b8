"""Tokenizer folders as repositories ship them, made of the vocabularies in tests/fixtures."""

import base64
import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from helpers import FIXTURES

from eqxdiff.text._sentencepiece import read_unigram


START, END = "<|startoftext|>", "<|endoftext|>"


def token(content: str, **flags: Any) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": content, **plain, **flags}


def legacy(token: dict[str, Any]) -> dict[str, Any]:
    return {"__type": "AddedToken", **token}


CLIP_NAMED = {"bos_token": token(START), "eos_token": token(END), "unk_token": token(END)}
CLIP_CONFIG = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
}
CLIP_LEGACY = {
    **CLIP_CONFIG,
    **{name: legacy(value) for name, value in CLIP_NAMED.items()},
    "pad_token": END,
    "special_tokens_map_file": "./special_tokens_map.json",
}
CLIP_STRINGS = {
    **CLIP_CONFIG,
    "additional_special_tokens": [],
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "clean_up_tokenization_spaces": True,
}
CLIP_FILES = {
    # Stable Diffusion 1, whose map repeats the config, and 2, whose map has another padding.
    "sd1": (CLIP_LEGACY, {**CLIP_NAMED, "pad_token": END}),
    "sd2": (CLIP_LEGACY, {**CLIP_NAMED, "pad_token": "!"}),
    # The second tokenizer of SDXL, and that of FLUX.1: a list of added tokens, bare strings.
    "sdxl_2": (
        {
            **CLIP_STRINGS,
            "pad_token": "!",
            "added_tokens_decoder": {
                "0": token("!", normalized=False, special=True),
                "49406": token(START, special=False),
                "49407": token(END, normalized=False, special=False),
            },
        },
        {"bos_token": START, "eos_token": END, "pad_token": "!", "unk_token": END},
    ),
    "flux": (
        {
            **CLIP_STRINGS,
            "pad_token": END,
            "added_tokens_decoder": {
                "49406": token(START, special=True),
                "49407": token(END, special=True),
            },
        },
        None,
    ),
    # Both ways of saying it in one file, which differ: the list counts.
    "both": (
        {
            **CLIP_LEGACY,
            "added_tokens_decoder": {
                "49406": token(START, normalized=False, special=True),
                "49407": token(END, normalized=False, special=True),
            },
        },
        {**CLIP_NAMED, "pad_token": "!"},
    ),
    "bare": (None, None),
}
T5_CONFIG = {
    "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)],
    "clean_up_tokenization_spaces": True,
    "eos_token": "</s>",
    "extra_ids": 100,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "tokenizer_class": "T5Tokenizer",
    "unk_token": "<unk>",
}


def write_json(file: Path, fields: Any) -> None:
    if fields is not None:
        file.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")


def clip_vocab() -> tuple[dict[str, int], list[str]]:
    """CLIP's 49,408 tokens with their ids, and its merges."""
    merges = gzip.decompress((FIXTURES / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *words, START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def write_clip(folder: Path, kind: str = "flux") -> Path:
    """A CLIP tokenizer with `vocab.json` and `merges.txt` and the other files of a repository."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = clip_vocab()
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    config, special = CLIP_FILES[kind]
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    return folder


def write_clip_json(folder: Path) -> Path:
    """A CLIP tokenizer with `tokenizer.json` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = clip_vocab()
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocab[content], **token(content, special=True)} for content in (START, END)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocab[END]],
            "cls": [START, vocab[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    write_json(folder / "tokenizer.json", fields)
    return folder


def spiece() -> bytes:
    """A SentencePiece model of 1,000 pieces, trained like T5's."""
    return gzip.decompress((FIXTURES / "t5_spiece.model.gz").read_bytes())


def write_t5(folder: Path) -> Path:
    """A T5 tokenizer with `spiece.model`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece())
    write_json(folder / "tokenizer_config.json", T5_CONFIG)
    return folder


def write_t5_json(folder: Path) -> Path:
    """A T5 tokenizer with `tokenizer.json`, as converted by transformers 4."""
    folder.mkdir(parents=True, exist_ok=True)
    model = read_unigram(spiece())
    assert model.charsmap is not None
    extras = [f"<extra_id_{i}>" for i in reversed(range(100))]
    names = [piece for piece, _ in model.pieces] + extras
    special = ["<pad>", "</s>", "<unk>", *extras]
    flags = {"normalized": False, "special": True}
    blank = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": names.index(name), **token(name, **flags)} for name in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {
                    "type": "Precompiled",
                    "precompiled_charsmap": base64.b64encode(model.charsmap).decode(),
                },
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        "pre_tokenizer": blank,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                end,
                {"Sequence": {"id": "B", "type_id": 0}},
                end,
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": blank,
        "model": {
            "type": "Unigram",
            "unk_id": model.unk_id,
            "vocab": [*map(list, model.pieces), *([name, 0.0] for name in extras)],
            "byte_fallback": False,
        },
    }
    write_json(folder / "tokenizer.json", fields)
    write_json(folder / "tokenizer_config.json", T5_CONFIG)
    return folder


FOLDERS = {
    **{kind: (lambda folder, kind=kind: write_clip(folder, kind)) for kind in CLIP_FILES},
    "clip_json": write_clip_json,
    "t5": write_t5,
    "t5_json": write_t5_json,
}


QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def qwen_vocab() -> tuple[dict[str, int], list[str]]:
    """A byte-level vocabulary in the manner of Qwen's, and its merges, trained by `qwen3.py`."""
    fields = json.loads(gzip.decompress((FIXTURES / "qwen_merges.json.gz").read_bytes()))
    return fields["vocab"], fields["merges"]


def write_qwen(folder: Path, *, whole: bool) -> Path:
    """A tokenizer of Qwen's, with `tokenizer.json` where it is `whole`, or of two files."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = qwen_vocab()
    flags = {"normalized": False}
    added = [
        {"id": len(vocab) + i, **token(name, special="think" not in name, **flags)}
        for i, name in enumerate(QWEN_SPECIAL)
    ]
    if whole:
        model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": None}
        fields = {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"}}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        fields |= {"pre_tokenizer": byte_level, "model": model}
        write_json(folder / "tokenizer.json", fields)
    else:
        write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    decoder = {str(each["id"]): {k: v for k, v in each.items() if k != "id"} for each in added}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": QWEN_SPECIAL[1:3],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
    return folder


NASTY = [
    *("a photo of a cat", "Masterpiece, best quality", "it's WE'LL I'd they'Ve y'all'd've 'tis"),
    *("Cafe\u0301 na\u0308ive \u212b", "Ünïcödé", "h̷e̷l̷l̷o̷", "İstanbul ǅ ß ẞ ﬁ ŉ Σίσυφος"),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈 ❤️", "🇩🇪🇫🇷", "一只猫在月亮上", "漢字かなカタカナｶﾀｶﾅ", "한국어 고양이"),
    *("العَرَبِيَّة صورة", "עִבְרִית", "हिन्दी बिल्ली", "ไทยแมว", "12345 3.14 1,000 ½ ² ٣ Ⅷ ①"),
    *(" ", "   ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\u3000", "\u00a0", "\u2028"),
    *("\u200b", "\ufeff"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"),
    *("<|im_", "|>", "<|IM_END|>"),
    *("!!!", "?!.,;:", "(masterpiece:1.2)", "[a|b]", "{x}", "<lora:x:0.8>", "\\n"),
    *("snake_case__", "--"),
    *("\x00\x01\x07\x7f\x85\u00ad", "\ufffd", "\U0010ffff", "x" * 40, "http://a.b/c?d=e&f#g"),
    *("$€£¥",),
]  # fmt: skip


def nasty_prompts(count: int = 2000) -> list[str]:
    """Prompts of up to a dozen awkward pieces, with and without blanks between; always the same."""
    rng = np.random.RandomState(13)
    prompts = []
    for _ in range(count):
        pieces = [NASTY[i] for i in rng.randint(len(NASTY), size=rng.randint(1, 13))]
        points = rng.randint(1, 0x2FFFF, size=rng.randint(4))
        pieces += [chr(point) for point in points if not 0xD800 <= point < 0xE000]
        order, joins = rng.permutation(len(pieces)), rng.randint(2, size=len(pieces))
        prompts.append(
            "".join(pieces[i] + " " * join for i, join in zip(order, joins, strict=True))
        )
    return prompts


def checksum(ids: Iterable[int]) -> int:
    """A number that tells one row of token ids from another."""
    return zlib.crc32(np.asarray(list(ids), np.int32).tobytes())
