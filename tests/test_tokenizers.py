"""Token ids against transformers, from every set of files that repositories ship."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import FIXTURES
from tokenizer_files import CLIP_FILES, FOLDERS, T5_CONFIG, spiece, write_json

from eqxdiff._errors import CheckpointError, PromptError, SourceError
from eqxdiff.text import Tokenizer
from eqxdiff.text._sentencepiece import read_unigram


RECORD = json.loads(gzip.decompress((FIXTURES / "tokens.json.gz").read_bytes()))
PROMPTS = RECORD["prompts"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write(root / kind) for kind, write in FOLDERS.items()}


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(folder) for kind, folder in folders.items()}


@pytest.fixture
def broken(folders, tmp_path):
    """A function that copies a folder with some files changed: by name, bytes, or `None` to go."""

    def make(kind: str, **changes: bytes | None) -> Path:
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        for name, content in changes.items():
            file = folder / {"json": "tokenizer.json", "spiece": "spiece.model"}.get(
                name, f"{name}.txt" if name == "merges" else f"{name}.json"
            )
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
        return folder

    return make


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("index", range(len(PROMPTS)), ids=[repr(p[:16]) for p in PROMPTS])
def test_ids_equal_those_of_transformers(tokenizers, kind, index):
    length, ids = RECORD["length"][kind], RECORD["ids"][kind][index]
    tokens = tokenizers[kind].encode(PROMPTS[index], length)
    padded = ids + [RECORD["pad"][kind]] * (length - len(ids))
    assert tokens.ids.tolist() == padded
    assert tokens.ids.dtype == np.int32
    assert tokens.length == len(ids)


@pytest.mark.parametrize("kind", FOLDERS)
def test_padding_is_that_of_the_files(tokenizers, kind):
    """Stable Diffusion 2 and SDXL's second tokenizer pad with an exclamation mark, which is 0."""
    pads = {"sd2": 0, "sdxl_2": 0, "t5": 0, "t5_json": 0}
    assert tokenizers[kind].pad_id == pads.get(kind, 49407)


def test_a_padding_token_within_a_prompt_stands_for_itself(tokenizers):
    """So that the mark at the end of a word is another token where it pads: as in transformers."""
    assert tokenizers["sd1"].encode("wow!").ids[2] == 256
    assert tokenizers["sd2"].encode("wow!").ids[2] == 0


def test_lengths_are_those_of_the_files(tokenizers):
    assert [tokenizers[kind].model_max_length for kind in ("sd1", "bare", "t5")] == [77, None, 512]
    assert tokenizers["sd1"].encode("a cat").ids.shape == (77,)
    with pytest.raises(ValueError, match="a length of None"):
        tokenizers["bare"].encode("a cat")


def test_vocab_size_is_one_more_than_the_highest_id(tokenizers):
    assert [tokenizers[kind].vocab_size for kind in ("sd1", "sd2", "t5")] == [49408, 49408, 1100]


@pytest.mark.parametrize("kind", ["flux", "t5"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_is_dropped_is_the_end_of_the_prompt(tokenizers, kind, prompt):
    tokenizer = tokenizers[kind]
    whole = tokenizer.encode(prompt, 4000)
    assert whole.dropped == ""
    for length in (2, 5, 12):
        tokens = tokenizer.encode(prompt, length)
        assert prompt.rstrip().endswith(tokens.dropped)
        assert bool(tokens.dropped) == (whole.length > length)
        if tokens.dropped:
            assert tokens.length == length
            np.testing.assert_array_equal(tokens.ids[:-1], whole.ids[: length - 1])


def test_dropped_text_is_as_the_user_wrote_it(tokenizers):
    prompt = "a  Photo of\ta CAFÉ, Cafe\u0301 &amp; more"
    assert tokenizers["flux"].encode(prompt, 6).dropped == "CAFÉ, Cafe\u0301 &amp; more"
    assert tokenizers["flux"].encode(prompt, 40).dropped == ""


def test_a_length_without_room_for_the_prompt_keeps_start_and_end(tokenizers):
    tokens = tokenizers["flux"].encode("a cat", 2)
    assert (tokens.ids.tolist(), tokens.dropped) == ([49406, 49407], "a cat")
    with pytest.raises(ValueError, match="a length of 1"):
        tokenizers["flux"].encode("a cat", 1)


def test_a_prompt_that_is_no_text_is_an_error(tokenizers):
    with pytest.raises(PromptError, match="a lone surrogate at position 2"):
        tokenizers["flux"].encode("a \ud83d cat")


def test_tokenizer_json_comes_first(folders, tokenizers, tmp_path):
    """Then vocab.json; transformers also prefers them in this order."""
    folder = shutil.copytree(folders["t5_json"], tmp_path / "both")
    (folder / "spiece.model").write_bytes(b"not looked at")
    (folder / "vocab.json").write_bytes(b"not looked at")
    ids = Tokenizer.load(folder).encode("a photo", 20).ids
    np.testing.assert_array_equal(ids, tokenizers["t5"].encode("a photo", 20).ids)
    folder = shutil.copytree(folders["flux"], tmp_path / "other")
    (folder / "spiece.model").write_bytes(b"not looked at")
    assert Tokenizer.load(folder).pad_id == 49407


def test_another_kind_of_tokenizer_json_is_used_as_it_is(tmp_path):
    end = {"SpecialToken": {"id": "[E]", "type_id": 0}}
    fields = {
        "version": "1.0",
        "truncation": {
            "max_length": 1,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        },
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [],
            "special_tokens": {"[E]": {"id": "[E]", "ids": [1], "tokens": ["[E]"]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"[U]": 0, "[E]": 1, "cat": 2}, "unk_token": "[U]"},
    }
    write_json(tmp_path / "tokenizer.json", fields)
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": "[E]"})
    assert Tokenizer.load(tmp_path).encode("cat dog cat", 6).ids.tolist() == [2, 0, 2, 1, 1, 1]
    del fields["model"]["vocab"]["[U]"]  # where this is needed the file is at fault
    write_json(tmp_path / "tokenizer.json", fields)
    with pytest.raises(CheckpointError, match="The tokenizer is damaged"):
        Tokenizer.load(tmp_path).encode("cat dog cat", 6)


def test_a_sentencepiece_model_is_read_whole():
    """1,000 pieces in the order of their ids, control pieces first, as the trainer wrote them."""
    model = read_unigram(spiece())
    assert [piece for piece, _ in model.pieces[:3]] == ["<pad>", "</s>", "<unk>"]
    assert (len(model.pieces), model.unk_id, model.user_defined) == (1000, 2, [])
    assert all(score < 0 for _, score in model.pieces[3:])
    assert model.charsmap is not None
    assert len(model.charsmap) > 100_000


@pytest.mark.parametrize("size", [1, 2, 3, 50, 20_000, 200_000, -1])
def test_a_sentencepiece_model_cut_short_is_an_error(size):
    with pytest.raises(ValueError, match=r"cut short|not a SentencePiece model|no unknown piece"):
        read_unigram(spiece()[:size])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("flux", {"vocab": b'{"a": '}, r"vocab\.json or .*merges\.txt is damaged"),
        ("flux", {"vocab": b'{"a": 1}'}, "out of vocabulary"),
        ("flux", {"merges": b"#version: 0.2\na b c\n"}, "Merges text file invalid at line"),
        ("flux", {"merges": b"\xff\xfe"}, "UTF-8"),
        (
            "flux",
            {"tokenizer_config": b"[]"},
            r"tokenizer_config\.json is damaged: it is not a JSON",
        ),
        ("flux", {"tokenizer_config": b"{"}, r"tokenizer_config\.json is damaged"),
        ("flux", {"tokenizer_config": b'{"padding_side": "left"}'}, "padding_side 'left' is not"),
        ("flux", {"tokenizer_config": b'{"pad_token": null}'}, "there is no `pad_token`"),
        ("flux", {"tokenizer_config": b'{"added_tokens_decoder": {"1": 2}}'}, "is damaged"),
        ("sd1", {"special_tokens_map": b'{"pad_token": 3}'}, "The tokenizer in .* is damaged"),
        ("t5", {"spiece": b""}, r"spiece\.model is damaged: .*no unknown piece"),
        ("t5", {"spiece": b"version https://git-lfs.github.com/spec/v1\n"}, "is damaged"),
        (
            "t5",
            {"tokenizer_config": b'{"extra_ids": "many"}'},
            r"tokenizer_config\.json is damaged",
        ),
        ("t5_json", {"json": b"{}"}, r"tokenizer\.json is damaged: no 'model' is in it"),
        ("t5_json", {"json": b'{"model": '}, r"tokenizer\.json is damaged"),
        ("t5_json", {"json": b'{"model": {"vocab": []}}'}, "no 'unk_id' is in it"),
    ],
)
def test_damaged_files_are_named(broken, kind, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(broken(kind, **changes))


def test_missing_files_are_named(broken, tmp_path):
    with pytest.raises(SourceError, match="has no tokenizer: neither"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"has a vocab\.json but no merges\.txt"):
        Tokenizer.load(broken("flux", merges=None))


def test_a_sentencepiece_model_of_another_kind_is_an_error(broken):
    """The trainer's `model_type` 2 is byte pairs."""
    at = spiece().index(b"\x18\x01", spiece().rindex("▁".encode()))
    data = spiece()[:at] + b"\x18\x02" + spiece()[at + 2 :]
    with pytest.raises(CheckpointError, match="not of the unigram kind"):
        Tokenizer.load(broken("t5", spiece=data))


def test_all_kinds_of_folder_are_recorded():
    assert set(RECORD["ids"]) == {*CLIP_FILES, "clip_json", "t5", "t5_json"} == set(FOLDERS)
    assert T5_CONFIG["extra_ids"] == 100
