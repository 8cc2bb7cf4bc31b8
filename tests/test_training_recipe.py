"""The recipe of flux-emoji: what the set and its captions promise. It needs no font."""

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest

from eqxdiff.models import find_model
from eqxdiff.text import Tokenizer
from eqxdiff.training import read_config


RECIPE = Path(__file__).parents[1] / "recipes" / "flux_emoji"


@pytest.fixture(scope="module")
def data():
    spec = importlib.util.spec_from_file_location("make_data", RECIPE / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(data):
    held_out = data.held_out_pairs(data.read_emoji())
    return [
        text
        for emoji in data.read_emoji()
        for colour in data.COLOURS
        if (emoji.name, colour) not in held_out
        for text in data.captions(emoji, colour)
    ]


def test_the_set_is_large_and_has_only_base_emoji(data):
    emoji = data.read_emoji()
    assert len(emoji) >= 200
    assert len(data.COLOURS) >= 10
    characters = [one.character for one in emoji]
    assert len(set(characters)) == len(characters)
    ranges = (0x1F3FB, 0x1F3FF), (0x1F1E6, 0x1F1FF), (0x1F550, 0x1F567)  # skins, flags, clocks
    for low, high in ranges:
        assert not any(low <= ord(character) <= high for character in characters)


def test_every_name_means_one_emoji(data):
    names = [name for one in data.read_emoji() for name in (one.name, *one.others)]
    assert len(set(names)) == len(names)


def test_pairs_held_out_are_in_no_caption(data, texts):
    emoji = {one.name: one for one in data.read_emoji()}
    held_out = data.held_out_pairs(data.read_emoji())
    assert len(set(held_out)) == 100
    seen = set(texts)
    for name, colour in held_out:
        assert not seen & set(data.captions(emoji[name], colour))


def test_the_tokenizers_read_every_caption_whole(data, texts, tmp_path):
    data.write_model(tmp_path, texts)
    assert (tmp_path / "model_index.json").is_file()
    for folder, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer = Tokenizer.load(tmp_path / folder)
        config = json.loads((tmp_path / encoder / "config.json").read_text())
        assert tokenizer.vocab_size == config["vocab_size"]
        assert len({tuple(tokenizer.encode(text, 40).ids) for text in set(texts)}) == len(
            set(texts)
        )
        assert max(tokenizer.encode(text, 40).length for text in texts[::7]) <= data.TEXT_TOKENS


def test_the_same_texts_give_the_same_tokenizers(data, texts):
    """Many pairs of bytes are equally frequent: which is merged first is not left to chance."""
    assert len({json.dumps(data.clip_files(texts[:8000])) for _ in range(5)}) == 1
    assert len({json.dumps(data.t5_files(texts[:8000])) for _ in range(2)}) == 1


def test_the_configs_are_read(data):
    fields = json.loads((RECIPE / "configs.json").read_text())
    family, preset = find_model("flux-schnell")
    parsed = {
        part: component.parse(fields[f"{part}/config.json"])
        for part, component in family.components.items()
    }
    scheduler = family.parse_scheduler(fields["scheduler/scheduler_config.json"])
    family.bind("flux-schnell", preset.defaults, {**parsed, "scheduler": scheduler})
    for name in ("autoencoder.toml", "flux.toml"):
        config = read_config(RECIPE / name)
        assert (config.data.height, config.data.width) == (data.SIZE, data.SIZE)
        assert tomllib.loads((RECIPE / name).read_text())["model"]["folder"] == config.model.folder
    assert config.data.max_sequence_length == data.TEXT_TOKENS
