"""Pictures and masks: read, refused, resized, cropped and pasted, as by diffusers' processor.

`tests/test_live.py` records what diffusers does anew.
"""

import io

import numpy as np
import pytest
from helpers import FIXTURES
from picture_files import CROPPED, RESIZED, make_mask, make_picture, make_rectangle
from PIL import Image

from eqxdiff import SettingError, SourceError
from eqxdiff.pictures import (
    check_mask,
    crop_region,
    fit,
    mask_to_latent,
    paste,
    prepare_mask,
    read_picture,
    to_grey,
    to_pil,
    to_signed,
    to_unit,
)


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "pictures.npz") as file:
        return {name: file[name] for name in file if name.startswith("processor/")}


def assert_agrees(value: np.ndarray, wanted: np.ndarray) -> None:
    """To one in 8 bits, which another version of PIL may round differently."""
    assert value.dtype == np.uint8
    assert value.shape == wanted.shape
    difference = np.abs(np.int16(value) - wanted)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def bytes_of(values: np.ndarray) -> np.ndarray:
    assert values.dtype == np.float32
    return np.uint8(np.round(values * 255))


@pytest.mark.parametrize("index", range(len(RESIZED)))
def test_pictures_are_resized_as_diffusers_does(index, reference):
    size, (height, width) = RESIZED[index]
    wanted = reference[f"processor/fit/{index}"]
    image = make_picture(index, *size)
    assert_agrees(fit(image, height, width), wanted)
    assert_agrees(fit(Image.fromarray(image), height, width), wanted)
    assert_agrees(fit(np.float32(image) / 255, height, width), wanted)


@pytest.mark.parametrize("index", range(len(RESIZED)))
def test_masks_are_prepared_as_diffusers_does(index, reference):
    """A soft mask, its blurred form, the mask of its latent, and what a threshold makes of it."""
    size, (height, width) = RESIZED[index]
    grey = make_mask(index, *size)
    mask = prepare_mask(grey, height, width)
    assert_agrees(bytes_of(mask), reference[f"processor/mask/{index}"])
    assert_agrees(bytes_of(np.float32(mask >= 0.5)), reference[f"processor/hard/{index}"])
    soft = prepare_mask(Image.fromarray(grey), height, width, blur=3)
    assert_agrees(bytes_of(soft), reference[f"processor/blurred/{index}"])
    assert_agrees(bytes_of(mask_to_latent(soft, 8)), reference[f"processor/latent/{index}"])


@pytest.mark.parametrize("index", range(len(CROPPED)))
def test_a_part_is_cropped_and_pasted_as_diffusers_does(index, reference):
    size, edges, (height, width), pad = CROPPED[index]
    image, mask = make_picture(index, *size), make_rectangle(size, edges)
    region = crop_region(mask, width, height, pad)
    assert region == tuple(reference[f"processor/region/{index}"])
    filled = fit(image, height, width, region=region)
    assert_agrees(filled, reference[f"processor/filled/{index}"])
    grey = prepare_mask(mask, height, width, region=region)
    assert_agrees(bytes_of(grey), reference[f"processor/filled mask/{index}"])
    made = make_picture(9, height, width)
    assert_agrees(paste(image, made, mask, region), reference[f"processor/pasted/{index}"])


def test_a_whole_picture_is_laid_under_what_the_mask_keeps(reference):
    image, made = (make_picture(i, 64, 96) for i in (1, 2))
    mask = make_mask(0, 64, 96)
    pasted = paste(image, made, mask)
    assert_agrees(pasted, reference["processor/laid over"])
    assert np.array_equal(pasted[mask == 0], image[mask == 0])
    assert np.array_equal(pasted[mask == 255], made[mask == 255])


def test_pixels_become_the_numbers_that_diffusers_computes():
    image = np.arange(3 * 256, dtype=np.uint16).astype(np.uint8).reshape(1, 256, 3)
    unit = image.astype(np.float32) / np.float32(255)
    for form in (image, Image.fromarray(image), unit, np.float64(unit)):
        assert np.array_equal(to_unit(form), unit)
        assert np.array_equal(to_signed(form), np.float32(2) * unit - np.float32(1))
        assert to_signed(form).dtype == to_unit(form).dtype == np.float32
    assert (to_signed(image).min(), to_signed(image).max()) == (-1, 1)


def test_numbers_of_the_right_size_are_not_rounded():
    image = np.random.RandomState(0).uniform(size=(16, 24, 3)).astype(np.float32)
    assert np.array_equal(fit(image, 16, 24), image)
    assert np.array_equal(prepare_mask(image[:, :, 0], 16, 24), image[:, :, 0])


def test_masks_of_all_kinds_are_the_same_mask():
    grey = make_rectangle((32, 48), (5, 20, 9, 40)) // 180 * 255
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    for mask in (grey > 0, grey / 255, Image.fromarray(grey), Image.fromarray(colour)):
        assert np.array_equal(to_grey(mask), grey)
        assert np.array_equal(prepare_mask(mask, 32, 48), grey / 255)
    bits = Image.fromarray(grey).convert("1")
    assert np.array_equal(to_grey(bits), grey)
    assert np.array_equal(to_grey(Image.fromarray(np.uint16(grey) * 257)), grey)


def write(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


def test_files_of_all_kinds_are_read(tmp_path):
    pixels = make_picture(0, 16, 24)
    image = Image.fromarray(pixels)
    assert np.array_equal(read_picture(write(tmp_path / "a.png", image)), pixels)
    see_through = image.copy()
    see_through.putalpha(7)
    assert np.array_equal(read_picture(write(tmp_path / "b.png", see_through)), pixels)
    grey = read_picture(write(tmp_path / "c.png", Image.fromarray(pixels[:, :, 0])))
    assert np.array_equal(grey, np.repeat(pixels[:, :, :1], 3, axis=2))
    deep = np.uint16(pixels[:, :, 0]) * 257
    assert np.array_equal(read_picture(write(tmp_path / "d.png", Image.fromarray(deep))), grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned = read_picture(write(tmp_path / "e.png", image, exif=exif))
    assert np.array_equal(turned, np.rot90(pixels, -1))


def test_what_is_no_picture_is_refused(tmp_path, monkeypatch):
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    image = Image.fromarray(make_picture(0, 64, 64))
    whole = write(tmp_path / "whole.png", image).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name in ("words.png", "empty.png", "half.png"):
        with pytest.raises(SourceError, match="cannot be read: is it one"):
            read_picture(tmp_path / name)
    with pytest.raises(SourceError, match="There is no picture"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(SourceError, match="Is a directory"):
        read_picture(tmp_path)
    with pytest.raises(SettingError, match="which number is white"):
        read_picture(write(tmp_path / "deep.tiff", Image.fromarray(np.ones((4, 4), np.float32))))
    for limit in (1000, 3000):  # over twice as many, and over as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(SourceError, match="too many pixels"):
            read_picture(tmp_path / "whole.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff", "bmp"])
@pytest.mark.filterwarnings("ignore")  # of PIL, of broken metadata
def test_a_damaged_file_is_a_picture_or_an_error(kind, tmp_path):
    """300 files with bytes changed or cut off."""
    buffer, rng = io.BytesIO(), np.random.RandomState(0)
    Image.fromarray(make_picture(0, 16, 24)).save(buffer, kind)
    refused = 0
    for _ in range(300):
        data = bytearray(buffer.getvalue())
        for place in rng.randint(0, len(data), rng.randint(1, 6)):
            data[place] = rng.randint(256)
        path = tmp_path / f"a.{kind}"
        path.write_bytes(data[: rng.randint(1, len(data) + 1)] if rng.rand() < 0.3 else data)
        try:
            assert read_picture(path).dtype == np.uint8
        except (SourceError, SettingError):
            refused += 1
    assert refused > 20


PICTURE, MASK = np.zeros((16, 24, 3), np.uint8), np.full((16, 24), 255, np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_pil("a.png", "image"), "`image` must be a PIL image or a NumPy array, not str"),
        (
            lambda: fit(PICTURE[:, :, 0], 8, 8),
            r"`image` has the shape \(16, 24\): it must be \(hei",
        ),
        (lambda: fit(PICTURE[:0], 8, 8), "`image` has the shape"),
        (lambda: fit(PICTURE[None], 8, 8), "`image` has the shape"),
        (lambda: fit(np.int64(PICTURE), 8, 8), "`image` has the type int64"),
        (lambda: fit(PICTURE > 0, 8, 8), "`image` has the type bool"),
        (lambda: fit(PICTURE - 0.1, 16, 24), "`image` has values out of range: they must be from"),
        (lambda: fit(PICTURE + 255.0, 8, 8), "`image` has values out of range"),
        (lambda: fit(PICTURE * np.nan, 8, 8), "`image` has values out of range"),
        (lambda: to_unit(PICTURE - 1.0, name="controls"), "`controls` has values out of range"),
        (lambda: to_grey(PICTURE), r"`mask` has the shape \(16, 24, 3\): it must be \(height, wid"),
        (lambda: prepare_mask(MASK * 1.0, 16, 24), "`mask` has values out of range"),
        (lambda: prepare_mask(MASK, 16, 24, blur=-1), "`mask_blur` -1 is out of range"),
        (lambda: prepare_mask(MASK, 16, 24, blur=np.nan), "`mask_blur` nan is out of range"),
        (lambda: prepare_mask(0 * MASK, 16, 24), "`mask` is black everywhere"),
        (lambda: crop_region(0 * MASK, 8, 8, 0), "`mask` is black everywhere"),
        (lambda: crop_region(MASK, 8, 8, -1), "`mask_crop` -1 is out of range"),
        (lambda: mask_to_latent(np.float32(MASK[:15]), 8), "`mask` is 24x15, which is not a mult"),
        (lambda: check_mask(MASK[:8], PICTURE), "`mask` is 24x8 and `image` is 24x16: they must"),
        (lambda: paste(PICTURE, PICTURE, MASK[:8]), "`mask` is 24x8 and `image` is 24x16"),
    ],
)
def test_what_cannot_be_used_is_refused(call, message):
    with pytest.raises(SettingError, match=message):
        call()
