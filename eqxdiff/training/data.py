"""A folder of images with captions, and the choice of them for each step."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError

from .._errors import DataError


METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and its captions."""

    path: Path
    captions: tuple[str, ...]


def read_folder(folder: str | Path, *, captions: bool = True) -> list[CaptionedImage]:
    """Lists the images of a folder with their captions, in the order of their names.

    A file `metadata.jsonl` has one JSON object a line, with `"file_name"` and `"text"`: a caption,
    or a list of captions of which each step picks one. Without that file the captions of `name.png`
    are in `name.txt`, one a line.

    **Arguments:**

    - `captions`: whether every image needs a caption.

    **Raises:** `DataError` where there are no images, or an image has no caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    listed = folder / METADATA
    examples = _listed(listed) if listed.exists() else _beside(folder)
    if not examples:
        raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    bare = [example.path.name for example in examples if not example.captions]
    if captions and bare:
        more = f" and {len(bare) - 1} others have" if len(bare) > 1 else " has"
        raise DataError(
            f"{bare[0]}{more} no caption: write one into {Path(bare[0]).stem}.txt or {METADATA}."
        )
    return examples


def _beside(folder: Path) -> list[CaptionedImage]:
    """Lists the images of a folder with the captions in the text files beside them."""
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return [CaptionedImage(image, _lines(image.with_suffix(".txt"))) for image in images]


def _lines(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    return tuple(filter(None, map(str.strip, text.splitlines())))


def _listed(file: Path) -> list[CaptionedImage]:
    """Lists the images that `metadata.jsonl` names."""
    examples = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            fields = json.loads(line)
            name, text = fields["file_name"], fields.get("text", [])
            texts = [text] if isinstance(text, str) else list(text)
            if not isinstance(name, str) or not all(isinstance(text, str) for text in texts):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f'{file}, line {number} is not {{"file_name": "...", "text": "..."}}.'
            ) from None
        if not (file.parent / name).is_file():
            raise DataError(f"{file}, line {number}: there is no file {name}.")
        examples.append(CaptionedImage(file.parent / name, tuple(filter(str.strip, texts))))
    return sorted(examples, key=lambda example: example.path)


def read_image(path: Path, height: int, width: int) -> Float[np.ndarray, "{height} {width} 3"]:
    """Reads an image as values from -1 to 1.

    An image of another size is resized until it covers the wanted size, and its middle is cut out.

    **Raises:** `DataError` where the file is broken or is no image.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is broken or is no image: {error}.") from None
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        covering = round(image.width * scale), round(image.height * scale)
        image = image.resize(covering, Image.Resampling.LANCZOS)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, np.float32) / 127.5 - 1


def batch_of(step: int, batch: int, count: int, seed: int) -> Int[np.ndarray, " {batch}"]:
    """Chooses the examples of a step: each of `count` once an epoch, in an order of the epoch."""
    position = np.arange(step * batch, (step + 1) * batch)
    orders = {
        int(epoch): np.random.default_rng([seed, 0, int(epoch)]).permutation(count)
        for epoch in np.unique(position // count)
    }
    return np.array([orders[int(at // count)][at % count] for at in position])


def pick(step: int, counts: Sequence[int] | np.ndarray, seed: int) -> Int[np.ndarray, " n"]:
    """Draws one number below each of `counts`, such as the number of a caption."""
    return np.random.default_rng([seed, 1, step]).integers(np.asarray(counts))


def dropped(step: int, count: int, rate: float, seed: int) -> np.ndarray:
    """Draws which of `count` captions are replaced by the empty text."""
    return np.random.default_rng([seed, 2, step]).random(count) < rate
