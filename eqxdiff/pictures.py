"""Pictures and masks that a user gives: read, checked, resized, cropped and pasted back.

Pictures are PIL images or arrays `(height, width, 3)`, masks are PIL images or arrays
`(height, width)`; arrays hold uint8, or floating point numbers from 0 to 1. White in a mask is
repainted. Everything agrees with `VaeImageProcessor` of diffusers:
https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/image_processor.py
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as PILImage, ImageFilter, ImageOps, UnidentifiedImageError

from ._errors import SettingError, SourceError


Pictured = PILImage.Image | np.ndarray
"""A picture or a mask as users give it."""

Region = tuple[int, int, int, int]
"""The left, upper, right and lower edge of a part of a picture, in pixels."""

LANCZOS = PILImage.Resampling.LANCZOS


def read_picture(path: Path, name: str = "image") -> UInt8[np.ndarray, "H W *rgb"]:
    """Reads a picture or a `"mask"`, turned upright where the camera noted how it was held.

    **Raises:** `SourceError` where the file is missing, or is no picture.
    """
    try:
        with PILImage.open(path) as image:
            return np.asarray(to_pil(ImageOps.exif_transpose(image), name))
    except FileNotFoundError:
        raise SourceError(f"There is no picture {path}.") from None
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning):
        raise SourceError(f"The picture {path} cannot be read: it has too many pixels.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        told = error.strerror if isinstance(error, OSError) else None
        why = f"{told}." if told else "is it one?"
        raise SourceError(f"The picture {path} cannot be read: {why}") from None


def to_pil(image: Any, name: str = "image") -> PILImage.Image:
    """Converts a picture to RGB, or the `"mask"` to greys, in 8 bits.

    **Raises:** `SettingError` where the argument called `name` is neither picture nor mask.
    """
    mode = "L" if name == "mask" else "RGB"
    if isinstance(image, np.ndarray):
        pixels = _check(image, name)
        if pixels.dtype != np.uint8:
            pixels = np.uint8(np.round(pixels * 255))
        image = PILImage.fromarray(pixels)
    elif not isinstance(image, PILImage.Image):
        kind = type(image).__name__
        raise SettingError(f"`{name}` must be a PIL image or a NumPy array, not {kind}.")
    return _convert(image, mode)


def fit(image: Pictured, height: int, width: int, *, region: Region | None = None) -> np.ndarray:
    """Stretches a picture to a size by Lanczos' filter.

    **Arguments:**

    - `region`: a part of the picture to take instead of all. It keeps its shape; its outermost
        pixels fill what it leaves of the size.

    **Returns:** `(height, width, 3)`, uint8; or the picture itself where it is an array of that
    size already.

    **Raises:** `SettingError` where `image` is no picture.
    """
    if region is None and isinstance(image, np.ndarray) and image.shape == (height, width, 3):
        return _check(image, "image")
    return np.asarray(_resize(to_pil(image, "image"), height, width, region))


def resize_and_cut(
    image: Pictured, size: tuple[int, int], cut: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Resizes a picture by Lanczos' filter and cuts it down around its middle, in 8 bits.

    **Arguments:**

    - `size`, `cut`: width and height before and after the cut.

    **Raises:** `SettingError` where `image` is no picture.
    """
    picture = to_pil(image)
    picture = picture if picture.size == size else picture.resize(size, LANCZOS)
    left, top = (size[0] - cut[0]) // 2, (size[1] - cut[1]) // 2
    return np.asarray(picture.crop((left, top, left + cut[0], top + cut[1])))


def to_unit(image: Pictured, *, name: str = "image") -> Float[np.ndarray, "H W 3"]:
    """Converts a picture to float32 from 0 to 1, in its own size.

    **Raises:** `SettingError` where the argument called `name` is no picture.
    """
    pixels = image if isinstance(image, np.ndarray) else np.asarray(to_pil(image, name))
    return _scale(_check(pixels, name))


def to_signed(image: Pictured) -> Float[np.ndarray, "H W 3"]:
    """Converts a picture to float32 from -1 to 1, as an autoencoder encodes it."""
    return np.float32(2) * to_unit(image) - np.float32(1)


def check_mask(mask: Pictured, image: Pictured) -> None:
    """Checks that a mask belongs to its picture.

    **Raises:** `SettingError` where they differ in size.
    """
    sizes = [to_pil(mask, "mask").size, to_pil(image, "image").size]
    if sizes[0] != sizes[1]:
        mask_size, image_size = (f"{width}x{height}" for width, height in sizes)
        raise SettingError(
            f"`mask` is {mask_size} and `image` is {image_size}: they must have the same size."
        )


def to_grey(mask: Pictured, *, blur: float = 0) -> UInt8[np.ndarray, "H W"]:
    """Converts a mask to 8 bits, in its own size.

    **Arguments:**

    - `blur`: the standard deviation, in the mask's own pixels, of a Gaussian that softens its edge.

    **Raises:** `SettingError` where `mask` is no mask or `blur` is below 0.
    """
    if not 0 <= blur < np.inf:
        raise SettingError(f"`mask_blur` {blur} is out of range: it is at least 0.")
    grey = to_pil(mask, "mask")
    return np.asarray(grey.filter(ImageFilter.GaussianBlur(blur)) if blur else grey)


def prepare_mask(
    mask: Pictured, height: int, width: int, *, blur: float = 0, region: Region | None = None
) -> Float[np.ndarray, "{height} {width}"]:
    """Converts a mask to a size as `fit` does, and to float32 from 0 to 1, where 1 is repainted.

    Greys stay: diffusers rounds them to 0 and 1 unless `mask_processor` has `do_binarize=False`.

    **Arguments:** as of `to_grey` and `fit`.

    **Raises:** `SettingError` where `mask` is no mask or nothing in it is repainted.
    """
    size, untouched = (height, width), region is None and not blur
    if untouched and isinstance(mask, np.ndarray) and mask.shape == size and mask.dtype != bool:
        pixels = _check(mask, "mask")
    else:
        grey = PILImage.fromarray(to_grey(mask, blur=blur))
        pixels = np.asarray(_resize(grey, height, width, region))
    if not pixels.any():
        raise SettingError("`mask` is black everywhere: nothing would be repainted.")
    return _scale(pixels)


def mask_to_latent(mask: Float[np.ndarray, "H W"], downscale: int) -> Float[np.ndarray, "h w"]:
    """Returns the mask of a latent: for each latent pixel the upper left pixel that it stands for.

    **Raises:** `SettingError` where a side is not a multiple of `downscale`.
    """
    if mask.shape[0] % downscale or mask.shape[1] % downscale:
        size = f"{mask.shape[1]}x{mask.shape[0]}"
        raise SettingError(f"`mask` is {size}, which is not a multiple of {downscale}.")
    return mask[::downscale, ::downscale]


def crop_region(mask: Pictured, width: int, height: int, pad: int) -> Region:
    """Finds the smallest part of a picture that holds all that is repainted.

    **Arguments:**

    - `width`, `height`: what the part will be resized to. It is widened to the same shape as far as
        the picture reaches.
    - `pad`: how many pixels to take around it.

    **Raises:** `SettingError` where nothing is repainted or `pad` is below 0.
    """
    if pad < 0:
        raise SettingError(f"`mask_crop` {pad} is out of range: it is at least 0.")
    grey = to_grey(mask)
    columns, rows = (np.flatnonzero(grey.any(axis=axis)) for axis in (0, 1))
    if len(rows) == 0:
        raise SettingError("`mask` is black everywhere: nothing would be repainted.")
    spans = []
    for found, size in zip((columns, rows), grey.shape[::-1], strict=True):
        spans.append((max(int(found[0]) - pad, 0), min(int(found[-1]) + 1 + pad, size)))
    (left, right), (top, bottom) = spans
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _widen(top, bottom, (right - left) / (width / height), grey.shape[0])
    else:
        left, right = _widen(left, right, (bottom - top) * (width / height), grey.shape[1])
    return left, top, right, bottom


def paste(
    original: Pictured, made: Pictured, mask: Pictured, region: Region | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Lays a picture that was made under the part of the original that the mask keeps.

    **Arguments:**

    - `region`: where in the original the picture belongs; `None` is everywhere.

    **Raises:** `SettingError` where `mask` and `original` differ in size.
    """
    check_mask(mask, original)
    image = to_pil(original, "image")
    kept = PILImage.new("RGBa", image.size)
    keep = ImageOps.invert(to_pil(mask, "mask"))
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=keep)
    below = to_pil(made, "image")
    if region is not None:
        left, top, right, bottom = region
        whole = PILImage.new("RGB", image.size)
        whole.paste(_resize_and_cut(below, bottom - top, right - left), (left, top))
        below = whole
    below = below.convert("RGBA")
    below.alpha_composite(kept.convert("RGBA"))
    return np.asarray(below.convert("RGB"))


def _widen(first: int, stop: int, wanted: float, size: int) -> tuple[int, int]:
    """A span of the wanted length around another, moved and cut so that it stays within a size."""
    more = int(wanted - (stop - first))
    first, stop = first - more // 2, stop + more - more // 2
    if stop >= size:
        first, stop = first - (stop - size), size
    if first < 0:
        first, stop = 0, stop - first
    return first, min(stop, size)


def _resize(
    image: PILImage.Image, height: int, width: int, region: Region | None
) -> PILImage.Image:
    if region is None:
        return image.resize((width, height), LANCZOS)
    image = image.crop(region)
    wide = width / height < image.width / image.height
    w = width if wide else image.width * height // image.height
    h = image.height * width // image.width if wide else height
    small, result = image.resize((w, h), LANCZOS), PILImage.new(image.mode, (width, height))
    left, top = width // 2 - w // 2, height // 2 - h // 2
    result.paste(small, (left, top))
    if wide and top > 0:
        for edge, at in ((0, 0), (h, top + h)):
            result.paste(small.resize((width, top), box=(0, edge, width, edge)), (0, at))
    elif left > 0:
        for edge, at in ((0, 0), (w, left + w)):
            result.paste(small.resize((left, height), box=(edge, 0, edge, height)), (at, 0))
    return result


def _resize_and_cut(image: PILImage.Image, height: int, width: int) -> PILImage.Image:
    """Resizes a picture, in its own shape, to cover a size, and cuts off what exceeds it."""
    tall = width / height > image.width / image.height
    w = width if tall else image.width * height // image.height
    h = image.height * width // image.width if tall else height
    result = PILImage.new("RGB", (width, height))
    result.paste(image.resize((w, h), LANCZOS), (width // 2 - w // 2, height // 2 - h // 2))
    return result


def _convert(image: PILImage.Image, mode: str) -> PILImage.Image:
    """Converts to 8 bits a channel; PIL itself would make all bright pixels of 16 bits white.

    **Raises:** `SettingError` where nothing says which number is white.
    """
    if image.mode.startswith("I;16"):
        image = PILImage.fromarray(np.uint8(np.asarray(image) >> 8))
    if image.mode in ("I", "F"):
        raise SettingError(
            f"A picture of 32 bits a pixel (mode {image.mode}) does not say which number is white: "
            "convert it to 8 or 16 bits."
        )
    return image.convert(mode)


def _scale(pixels: np.ndarray) -> Float[np.ndarray, "*shape"]:
    whole = pixels.dtype == np.uint8
    return pixels.astype(np.float32) / np.float32(255 if whole else 1)


def _check(array: np.ndarray, name: str) -> np.ndarray:
    """Returns the array. **Raises:** `SettingError` where its shape, type or values do not fit."""
    wanted = "(height, width)" if name == "mask" else "(height, width, 3)"
    fits = array.ndim == 2 if name == "mask" else array.shape[2:] == (3,)
    if not fits or 0 in array.shape:
        raise SettingError(f"`{name}` has the shape {array.shape}: it must be {wanted}.")
    if array.dtype == np.uint8 or (array.dtype == bool and name == "mask"):
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise SettingError(f"`{name}` has the type {array.dtype}: it must be uint8 or float.")
    if not (np.isfinite(array).all() and 0 <= array.min() and array.max() <= 1):
        raise SettingError(f"`{name}` has values out of range: they must be from 0 to 1.")
    return array
