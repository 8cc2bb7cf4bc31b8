"""Makes the pictures, captions and tokenizers to train `flux-emoji`.

    apt install fonts-noto-color-emoji
    python recipes/flux_emoji/make_data.py runs/emoji

The emoji are drawn from Noto Color Emoji (https://github.com/googlefonts/noto-emoji, SIL Open Font
License 1.1). Their names in `emoji.tsv` are the short names of Unicode's CLDR (Unicode License v3);
the other names are ours. The same font gives the same files, byte for byte.
"""

import argparse
import collections
import csv
import json
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from eqxdiff.text import example_tokenizer
from eqxdiff.text.tokenizer import CLIP_WORDS


FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size of this font, which holds bitmaps
SIZE = 64
EMOJI_SIZE = 52
HELD_OUT = 100
SEED = 0

COLOURS = {
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "red": (205, 40, 45),
    "orange": (245, 140, 35),
    "yellow": (250, 220, 70),
    "green": (60, 165, 75),
    "blue": (45, 105, 230),
    "dark blue": (20, 30, 95),
    "light blue": (150, 210, 245),
    "purple": (125, 60, 170),
    "pink": (250, 165, 200),
}

TEMPLATES = (
    "{thing} on a {colour} background",
    "{thing} on a {colour} background",
    "{thing} on {colour}",
    "{bare}, {colour} background",
    "{bare} on {colour}",
    "an emoji of {thing} on a {colour} background",
    "{thing} in front of a {colour} background",
)

UNCOUNTED = ("books", "broccoli", "corn", "coffee", "beer", "bread", "cheese", "fire", "grapes")
UNCOUNTED += ("blueberries", "cherries", "pancakes", "scissors", "french fries", "fries", "popcorn")
UNCOUNTED += ("sushi", "pasta", "bacon")

TEXT_TOKENS = 20
CLIP_VOCABULARY = 2000


class Emoji(NamedTuple):
    """An emoji of the set: its character, its CLDR name and its other names."""

    character: str
    name: str
    others: tuple[str, ...]


def read_emoji() -> list[Emoji]:
    """Reads the set, in the order of the list."""
    with open(Path(__file__).parent / "emoji.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    others = lambda row: tuple(filter(None, row["other names"].split("|")))
    return [Emoji(chr(int(row["codepoint"], 16)), row["name"], others(row)) for row in rows]


def held_out_pairs(emoji: list[Emoji]) -> list[tuple[str, str]]:
    """Draws the pairs of a name and a colour that training never sees, each emoji at most once."""
    chooser = random.Random(SEED)
    chosen = sorted(chooser.sample(range(len(emoji)), HELD_OUT))
    return [(emoji[i].name, chooser.choice(list(COLOURS))) for i in chosen]


def captions(emoji: Emoji, colour: str) -> list[str]:
    """Lists the captions of a picture. `benchmarks/emoji_measure.py` asks for the first."""
    found = []
    for name in (emoji.name, *emoji.others):
        for template in TEMPLATES:
            text = template.format(thing=with_article(name), bare=name, colour=colour)
            found.append(text.replace("a orange", "an orange"))
    return list(dict.fromkeys(found))


def with_article(name: str) -> str:
    """Puts "a" or "an" before the name of something that can be counted."""
    if name in UNCOUNTED:
        return name
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def draw(character: str, colour: tuple[int, int, int], font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draws the emoji in the middle of a square of one colour."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((20, 20), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise SystemExit(f"error: the font has no {character}")
    glyph = canvas.crop(box)
    scale = EMOJI_SIZE / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    glyph = glyph.resize((width, height), Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (SIZE, SIZE), (*colour, 255))
    picture.alpha_composite(glyph, ((SIZE - width) // 2, (SIZE - height) // 2))
    return picture.convert("RGB")


def write_pictures(folder: Path, emoji: list[Emoji], held_out: set[tuple[str, str]]) -> list[str]:
    """Writes the pictures of all pairs that are not held out, and their `metadata.jsonl`.

    **Returns:** the captions of all pictures.
    """
    font = ImageFont.truetype(FONT, FONT_SIZE)
    folder.mkdir(parents=True)
    lines, texts = [], []
    for one in emoji:
        for colour, rgb in COLOURS.items():
            if (one.name, colour) in held_out:
                continue
            name = f"{ord(one.character):x}-{colour.replace(' ', '-')}.png"
            draw(one.character, rgb, font).save(folder / name)
            texts += captions(one, colour)
            lines.append(json.dumps({"file_name": name, "text": captions(one, colour)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return texts


def clip_files(texts: list[str]) -> dict[str, str]:
    """Trains a CLIP tokenizer: it merges pairs of bytes that are frequent in the texts."""
    files = example_tokenizer("clip")
    *alphabet, start, end = json.loads(files["vocab.json"])
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    split = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The order of the characters decides between pairs of one frequency. The trainer takes the ends
    # of words in another order in each run, unless they are given.
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY,
        end_of_word_suffix="</w>",
        special_tokens=sorted({f"{char}</w>" for text in texts for char in text.lower()}),
        show_progress=False,
    )
    trained.train_from_iterator((text.lower() for text in texts), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), start, end])
    files["vocab.json"] = json.dumps({token: i for i, token in enumerate(tokens)})
    files["merges.txt"] = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""])
    config = json.loads(files["tokenizer_config.json"])
    config["model_max_length"] = TEXT_TOKENS
    files["tokenizer_config.json"] = json.dumps(config, indent=2)
    return files


def t5_files(texts: list[str]) -> dict[str, str]:
    """Makes a T5 tokenizer: the words of the texts by frequency, and all printable ASCII."""
    files = example_tokenizer("t5")
    backend = json.loads(files["tokenizer.json"])
    letters = {piece: score - 20.0 for piece, score in backend["model"]["vocab"][3:98]}
    counts = collections.Counter(piece for text in texts for piece in _pieces(text))
    words = {piece: math.log(n / counts.total()) for piece, n in sorted(counts.items())}
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [[token, 0.0] for token in special]
    pieces += [list(pair) for pair in {**letters, **words}.items()]
    extra = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    ids = {token: i for i, token in enumerate([piece for piece, _ in pieces] + extra)}
    backend["model"]["vocab"] = [*pieces, *([token, 0.0] for token in extra)]
    for token in backend["added_tokens"]:
        token["id"] = ids[token["content"]]
    backend["added_tokens"].sort(key=lambda token: token["id"])
    files["tokenizer.json"] = json.dumps(backend, ensure_ascii=False)
    return files


def _pieces(text: str) -> list[str]:
    """Splits a text into words. A word after a blank begins with the mark of the blank."""
    words = [re.findall(r"[\w']+|[^\w\s]", word) for word in text.split()]
    return [piece for first, *rest in words for piece in (f"\u2581{first}", *rest)]


def write_model(folder: Path, texts: list[str]) -> None:
    """Writes the configs and tokenizers of the model, without weights."""
    configs = json.loads((Path(__file__).parent / "configs.json").read_text(encoding="utf-8"))
    clip, t5 = clip_files(texts), t5_files(texts)
    configs["text_encoder/config.json"]["vocab_size"] = len(json.loads(clip["vocab.json"]))
    tokens = len(json.loads(t5["tokenizer.json"])["model"]["vocab"])
    configs["text_encoder_2/config.json"]["vocab_size"] = tokens
    files = {path: json.dumps(config, indent=2) + "\n" for path, config in configs.items()}
    files |= {f"tokenizer/{name}": text for name, text in clip.items()}
    files |= {f"tokenizer_2/{name}": text for name, text in t5.items()}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    folder = parser.parse_args().folder
    if folder.exists():
        raise SystemExit(f"error: {folder} exists already")
    if not Path(FONT).exists():
        raise SystemExit(f"error: there is no {FONT}: apt install fonts-noto-color-emoji")
    emoji = read_emoji()
    held_out = held_out_pairs(emoji)
    texts = write_pictures(folder / "pictures", emoji, set(held_out))
    write_model(folder / "model", texts)
    pairs = "".join(f"{name}\t{colour}\n" for name, colour in held_out)
    (folder / "held_out.tsv").write_text(f"name\tcolour\n{pairs}", encoding="utf-8")
    print(f"{len(emoji)} emoji, {len(COLOURS)} colours, {len(held_out)} pairs held out")


if __name__ == "__main__":
    main()
