"""Measures how often flux-emoji draws the emoji and the background of a caption.

    apt install fonts-noto-color-emoji
    python benchmarks/emoji_measure.py [--weights FOLDER] [--sheet SHEET.png]

The script draws 300 pictures: the 100 pairs of a name and a colour that training never saw
together, and 200 other pairs. It prints how many pictures have the right background and how many
show the right emoji, and writes a sheet of the first 40 pictures, with the seeds 0 to 39.

The background is the mean of a frame of 5 pixels, which no emoji of the set reaches. It counts as
the nearest of the colours. The emoji counts as the nearest of the set, drawn from the font on the
colour of the caption. The distance is between pictures averaged to 16x16 pixels, in CIELAB. As a
control, each picture is also compared with the caption of the picture before it: `control` is the
share of pictures that show the emoji of that caption, and should be near 0.
"""

import argparse
import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

import eqxdiff
from eqxdiff.training.samples import sheet


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "flux_emoji"))

import make_data


SEEN, SEED, FRAME, COARSE, SHEET = 200, 1, 5, 16, 40


def questions() -> list[tuple[str, str, bool]]:
    """Lists names, colours, and whether training never saw the pair, in a shuffled order."""
    emoji = make_data.read_emoji()
    held_out = make_data.held_out_pairs(emoji)
    chooser = random.Random(SEED)
    others = [(e.name, c) for e in emoji for c in make_data.COLOURS if (e.name, c) not in held_out]
    asked = [(*pair, True) for pair in held_out]
    asked += [(*pair, False) for pair in chooser.sample(others, SEEN)]
    chooser.shuffle(asked)
    return asked


def lab(pixels: np.ndarray) -> np.ndarray:
    """Converts sRGB from 0 to 1 to CIELAB under D65 (IEC 61966-2-1 and CIE 15)."""
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.array(matrix).T / [0.9505, 1.0, 1.089]
    cube = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(cube, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def coarse(pictures: np.ndarray) -> np.ndarray:
    """Returns the features of pictures `(n, h, w, 3)` from 0 to 1."""
    n, h, w, _ = pictures.shape
    blocks = pictures.reshape(n, COARSE, h // COARSE, COARSE, w // COARSE, 3)
    return lab(blocks.mean(axis=(2, 4))).reshape(n, -1)


def frame_colour(picture: np.ndarray) -> np.ndarray:
    """Returns the mean colour of the frame."""
    inside = np.zeros(picture.shape[:2], bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    return picture[~inside].mean(axis=0)


def ranks(pictures: np.ndarray, asked: list[tuple[str, str, bool]]) -> list[int]:
    """Counts the emoji of the set that are nearer to each picture than the emoji of its caption."""
    emoji = make_data.read_emoji()
    font = ImageFont.truetype(make_data.FONT, make_data.FONT_SIZE)
    names = [one.name for one in emoji]
    features, found = coarse(pictures), []
    references = {
        colour: coarse(
            np.stack([np.asarray(make_data.draw(e.character, rgb, font)) / 255 for e in emoji])
        )
        for colour, rgb in make_data.COLOURS.items()
    }
    for feature, (name, colour, _) in zip(features, asked, strict=True):
        distances = np.linalg.norm(references[colour] - feature, axis=1)
        found.append(int((distances < distances[names.index(name)]).sum()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="flux-emoji")
    parser.add_argument("--weights", help="a folder of other weights")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--count", type=int, default=300, help="how many pictures to draw")
    parser.add_argument("--sheet", type=Path, help="where to write the sheet of 40 pictures")
    options = parser.parse_args()
    asked = questions()[: options.count]
    emoji = {one.name: one for one in make_data.read_emoji()}
    prompts = [make_data.captions(emoji[name], colour)[0] for name, colour, _ in asked]
    pipe = eqxdiff.load(options.model, options.weights)
    given = {"height": make_data.SIZE, "width": make_data.SIZE}
    given["max_sequence_length"] = make_data.TEXT_TOKENS
    given |= {k: v for k in ("steps", "cfg") if (v := getattr(options, k)) is not None}
    began = time.monotonic()
    pictures = []
    for seed, prompt in enumerate(prompts):
        pictures.append(eqxdiff.generate(pipe, prompt, seed=seed, **given).arrays[0])
    seconds = time.monotonic() - began
    pictures = np.stack(pictures)
    palette = lab(np.array(list(make_data.COLOURS.values())) / 255)
    colours = list(make_data.COLOURS)
    nearest = [
        colours[int(np.linalg.norm(palette - lab(frame_colour(picture)), axis=1).argmin())]
        for picture in pictures
    ]
    right = np.array(
        [found == colour for found, (_, colour, _) in zip(nearest, asked, strict=True)]
    )
    rank = np.array(ranks(pictures, asked))
    # The measure must be able to fail: it compares each picture with the caption before its own.
    others = [(before[0], colour, new) for before, (_, colour, new) in pairwise(asked)]
    control = float((np.array(ranks(pictures[1:], others)) < 1).mean())
    new = np.array([held_out for *_, held_out in asked])
    print("| captions | | background | emoji, first | emoji, first five |")
    print("|---|---|---|---|---|")
    table = {}
    for label, rows in (("seen", ~new), ("never seen together", new), ("all", new | True)):
        values = [right[rows].mean(), (rank[rows] < 1).mean(), (rank[rows] < 5).mean()]
        table[label] = [round(float(value), 4) for value in values]
        cells = " | ".join(f"{100 * value:.1f} %" for value in values)
        print(f"| {label} | {rows.sum()} | {cells} |")
    print(json.dumps({"table": table, "control": control, "seconds": round(seconds, 1), **given}))
    if options.sheet is not None:
        sheet(pictures[:SHEET]).resize((1024, 640), Image.Resampling.NEAREST).save(options.sheet)


if __name__ == "__main__":
    main()
