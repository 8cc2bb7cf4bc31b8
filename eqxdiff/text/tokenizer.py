"""Tokenizers from the files that repositories ship, with the ids of transformers 5.23.

Source: `CLIPTokenizer`, `T5Tokenizer` and `Qwen2Tokenizer` of transformers 5, which build the same
pipelines of the `tokenizers` package, whichever file the vocabulary comes from.
"""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Int
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as Backend,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from .._errors import CheckpointError, EqxdiffError, PromptError, SourceError
from ._sentencepiece import read_unigram


NAMED_TOKENS = tuple(f"{kind}_token" for kind in "bos eos unk sep pad cls mask".split())
CLIP_TOKENS = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
T5_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
T5_EXTRA_IDS = 100
QWEN_END = "<|endoftext|>"
QWEN_TOKENS = {"unk_token": QWEN_END, "eos_token": QWEN_END, "pad_token": QWEN_END}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenized(NamedTuple):
    """The token ids of a prompt."""

    ids: Int[np.ndarray, " tokens"]
    """With start and end token, padded; int32."""

    length: int
    """How many of the ids are not padding."""

    dropped: str
    """The end of the prompt for which there was no room."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns prompts into token ids.

    - `backend`: the tokenizer of the `tokenizers` package, without truncation and padding.
    - `pad_id`: what shorter prompts are padded with, on the right.
    - `model_max_length`: the number of tokens that the model was made for, if any is stated.
    """

    backend: Backend
    pad_id: int
    model_max_length: int | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads `tokenizer.json`, else `vocab.json` and `merges.txt`, else `spiece.model`.

        Special tokens come from `tokenizer_config.json` or, where that does not list its added
        tokens, also from `special_tokens_map.json`.

        **Raises:** `SourceError` where the folder has none of these; `CheckpointError` where one
        is damaged or is of an unknown kind.
        """
        folder = pathlib.Path(folder)
        config = _read_json(folder / "tokenizer_config.json", missing_ok=True)
        for side in ("padding_side", "truncation_side"):
            if config.get(side, "right") != "right":
                file = folder / "tokenizer_config.json"
                raise CheckpointError(f"{file}: {side} {config[side]!r} is not supported.")
        backend, defaults, extras = _read_backend(folder, config)
        with _blame(f"The tokenizer in {folder}"):
            named, tokens = _special_tokens(folder, config, defaults, extras)
            backend.add_tokens(tokens)
            _set_end_tokens(backend, named, defaults)
            if "pad_token" not in named:
                raise ValueError("there is no `pad_token`")
            pad_id = _id(backend, named["pad_token"])
        longest = config.get("model_max_length", config.get("max_len"))
        longest = int(longest) if isinstance(longest, int | float) and longest < 1e9 else None
        return cls(backend, pad_id, longest)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, which the model's embedding must hold."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(
        self, prompt: str, max_length: int | None = None, *, strip: bool = True
    ) -> Tokenized:
        """The ids of one prompt, cut and padded to `max_length`, by default `model_max_length`.

        **Arguments:**

        - `strip`: whether the blanks around what is dropped are left out of the report.

        **Raises:** `PromptError` where the prompt is no valid Unicode text; `CheckpointError` where
        the tokenizer has neither a token for a character nor one for what it does not know;
        `ValueError` where `max_length` leaves no room for the start and end token, or where neither
        states a length.
        """
        max_length = self.model_max_length if max_length is None else max_length
        room = (max_length or 0) - self.backend.num_special_tokens_to_add(False)
        if max_length is None or room < 0:
            raise ValueError(f"A prompt cannot be tokenized to a length of {max_length}.")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"The prompt is no valid Unicode text: a lone surrogate at position {error.start}."
            ) from None
        with _blame("The tokenizer"):
            encoding = self.backend.encode(prompt, add_special_tokens=False)
        dropped = prompt[encoding.offsets[room][0] :] if len(encoding) > room else ""
        dropped = dropped.strip() if strip else dropped
        encoding.truncate(room)
        ids = self.backend.post_process(encoding).ids
        padded = np.full(max_length, self.pad_id, np.int32)
        padded[: len(ids)] = ids
        return Tokenized(padded, len(ids), dropped)


def _read_backend(
    folder: pathlib.Path, config: Mapping[str, Any]
) -> tuple[Backend, dict[str, str], list[str]]:
    """The tokenizer without special tokens, those that its kind names, and others that it has."""
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    with _blame(folder / "tokenizer_config.json"):
        extras = [f"<extra_id_{i}>" for i in range(config.get("extra_ids", T5_EXTRA_IDS))]
    if (file := folder / "tokenizer.json").is_file():
        fields = _read_json(file)
        with _blame(file):
            model = fields["model"]
            if kind in ("CLIPTokenizer", "") and model.get("end_of_word_suffix") == "</w>":
                merges = [_pair(merge) for merge in model["merges"]]
                return _clip_backend(model["vocab"], merges), CLIP_TOKENS, []
            if kind in ("T5Tokenizer", "") and model.get("type", "Unigram") == "Unigram":
                pieces = [(piece, score) for piece, score in model["vocab"]]
                backend = _t5_backend(pieces, model["unk_id"], _charsmap(fields["normalizer"]))
                return backend, T5_TOKENS, extras
            if kind == "Qwen2Tokenizer":
                merges = [_pair(merge) for merge in model["merges"]]
                return _qwen_backend(model["vocab"], merges), QWEN_TOKENS, []
            backend = Backend.from_str(json.dumps(fields))
            backend.no_truncation()
            backend.no_padding()
            return backend, {}, []
    if (file := folder / "vocab.json").is_file():
        merges = folder / "merges.txt"
        if not merges.is_file():
            raise SourceError(f"{folder} has a vocab.json but no merges.txt.")
        with _blame(file, merges):
            vocab, pairs = models.BPE.read_file(str(file), str(merges))
            if kind == "Qwen2Tokenizer":
                return _qwen_backend(vocab, pairs), QWEN_TOKENS, []
            return _clip_backend(vocab, pairs), CLIP_TOKENS, []
    if (file := folder / "spiece.model").is_file():
        with _blame(file):
            model = read_unigram(file.read_bytes())
            pieces = model.pieces + [(token, 0.0) for token in reversed(extras)]
            backend = _t5_backend(pieces, model.unk_id, model.charsmap)
            return backend, T5_TOKENS, [*model.user_defined, *extras]
    raise SourceError(
        f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt, nor "
        "spiece.model."
    )


def _clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Backend:
    """Lower-cased words without the blanks between them, as pairs of bytes."""
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=CLIP_TOKENS["unk_token"],
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    return backend


def _qwen_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Backend:
    """Words with the blank before them and runs of other characters, as pairs of bytes."""
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    return backend


def _t5_backend(pieces: list[tuple[str, float]], unk_id: int, charsmap: bytes | None) -> Backend:
    """Words that begin with a visible blank, each split in the most probable way."""
    backend = Backend(models.Unigram(pieces, unk_id=unk_id, byte_fallback=False))
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    blank = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), blank])
    return backend


def _charsmap(normalizer: Any) -> bytes | None:
    """The character map of a `tokenizer.json`."""
    if not normalizer:
        return None
    for step in normalizer.get("normalizers", [normalizer]):
        if step["type"] == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"], validate=True)
    return None


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge as `tokenizer.json` spells it now or spelled it once."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _set_end_tokens(
    backend: Backend, named: Mapping[str, str], defaults: Mapping[str, str]
) -> None:
    """Lets start and end token be added. A tokenizer of another kind brings its own rule, and
    Qwen's adds none."""
    if not defaults or defaults == QWEN_TOKENS:
        return
    end = named["eos_token"], _id(backend, named["eos_token"])
    if "bos_token" in defaults:
        start = named["bos_token"], _id(backend, named["bos_token"])
        backend.post_processor = processors.RobertaProcessing(
            end, start, trim_offsets=False, add_prefix_space=False
        )
    else:
        backend.post_processor = processors.TemplateProcessing(
            single=["$A", end[0]], special_tokens=[end]
        )


def _id(backend: Backend, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise ValueError(f"it has no token {token!r}")
    return index


def _special_tokens(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    defaults: Mapping[str, str],
    extras: list[str],
) -> tuple[dict[str, str], list[AddedToken]]:
    """Which token ends a text, pads it and so on, and all tokens that stand for themselves."""
    named: dict[str, Any] = {**defaults, **{k: config[k] for k in NAMED_TOKENS if k in config}}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        for index, fields in config["added_tokens_decoder"].items():
            listed[int(index)] = AddedToken(**fields)
    else:
        for key, value in _read_json(folder / "special_tokens_map.json", missing_ok=True).items():
            if key in NAMED_TOKENS:
                named[key] = value
            elif key in ("additional_special_tokens", "extra_special_tokens"):
                more = [*more, *value]
        known = {_content(token) for token in [*named.values(), *more] if token is not None}
        for token, index in _read_json(folder / "added_tokens.json", missing_ok=True).items():
            special = token in known
            listed[index] = AddedToken(token, normalized=not special, special=special)
        file = folder / "tokenizer.json"
        for fields in _read_json(file, missing_ok=True).get("added_tokens", []):
            listed[fields["id"]] = AddedToken(**{k: v for k, v in fields.items() if k != "id"})
    if isinstance(more, Mapping):
        more = list(more.values())
    if any("<extra_id_" in _content(token) for token in more):
        extras = [token for token in extras if "<extra_id_" not in token]
    names = {name: named[name] for name in NAMED_TOKENS if named.get(name) is not None}
    contents = {name: _content(token) for name, token in names.items()}
    tokens = [token for _, token in sorted(listed.items(), key=lambda item: item[0])]
    seen = {(kind, token.content) for token in tokens for kind in (str, AddedToken)}
    for token in [*names.values(), *more, *extras]:
        # A token listed both with flags and as a bare string is added twice: the second counts.
        kind = str if isinstance(token, str) else AddedToken
        if (kind, _content(token)) not in seen:
            seen.add((kind, _content(token)))
            tokens.append(_token(token, special=True))
    for token in tokens:
        token.special = token.special or token.content in contents.values()
    return contents, tokens


def _token(value: Any, *, special: bool) -> AddedToken:
    """A token as the files spell it: a string, or an object with its flags."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {key: flag for key, flag in value.items() if key not in ("__type", "special")}
    return AddedToken(**flags, special=special)


def _content(value: Any) -> str:
    return value if isinstance(value, str) else _token(value, special=True).content


def _read_json(file: pathlib.Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not file.is_file():
        return {}
    with _blame(file):
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        return fields


@contextlib.contextmanager
def _blame(*sources: object) -> Iterator[None]:
    """Reports whatever goes wrong inside as damage to the sources."""
    names = " or ".join(str(source) for source in sources)
    try:
        yield
    except EqxdiffError:
        raise
    except OSError as error:
        raise SourceError(f"{names} cannot be read: {error.strerror}.") from error
    except Exception as error:  # the tokenizers package raises nothing more precise
        detail = f"no {error} is in it" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{names} is damaged: {detail}.") from error
