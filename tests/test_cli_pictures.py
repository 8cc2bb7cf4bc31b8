"""Pictures from pictures on the command line: what is made, what is recorded, what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from command import cli as cli, dev as dev, generate as generate, pixels
from PIL import Image
from sd_files import picture


PHOTO = picture(0, 64, 64)
MASK = np.zeros((64, 64), np.uint8)
MASK[16:48, 24:40] = 255


@pytest.fixture
def files(tmp_path) -> Path:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(0 * MASK).save(tmp_path / "black.png")
    Image.fromarray(MASK[:32]).save(tmp_path / "flat.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def recorded(path: str | Path) -> tuple[dict, str]:
    """The object and the text in a picture's file."""
    with Image.open(path) as image:
        return json.loads(image.text["eqxdiff"]), image.text["parameters"]


def test_a_picture_is_made_from_a_picture_and_says_so(generate, files):
    """Its name and its pixels are in the metadata and in the JSON, and so is the strength."""
    own = ("-p", "a cat", "-s", 3)
    plain = generate(*own, "-o", "plain.png")
    given = (*own, "--image", files / "photo.png")
    run = generate(*given, "-o", "half.png", "--strength", 0.5, "--json")
    assert (plain.status, run.status) == (0, 0)
    told = {"file": "photo.png", "sha256": hashlib.sha256(PHOTO.tobytes()).hexdigest()}
    record, text = recorded("half.png")
    for facts in (record, run.json):
        assert facts["image"] == told
        assert facts["settings"]["strength"] == 0.5
        assert "mask" not in facts
    assert "Denoising strength: 0.5" in text
    assert next(event["total"] for event in run.events if event.get("what") == "sampling") == 1
    assert (pixels("half.png") != pixels("plain.png")).any()
    generate(*given, "-o", "whole.png", "--strength", 1)
    assert (pixels("whole.png") == pixels("plain.png")).all()
    assert recorded("plain.png")[0].keys().isdisjoint({"image", "mask", "mask_blur", "mask_crop"})


def test_a_masked_part_is_made_anew_and_the_rest_is_kept(generate, files):
    """Cropped, so that the rest has the very pixels of the input picture."""
    inputs = ("--image", files / "photo.png", "--mask", files / "mask.png")
    run = generate("-p", "a cat", *inputs, "--mask-crop", 0, "-o", "sharp.png", "--json")
    assert run.status == 0
    kept = MASK == 0
    assert (pixels("sharp.png")[kept] == PHOTO[kept]).all()
    assert (pixels("sharp.png")[~kept] != PHOTO[~kept]).any()
    sha256 = hashlib.sha256(MASK.tobytes()).hexdigest()
    for facts in (recorded("sharp.png")[0], run.json):
        assert facts["mask"] == {"file": "mask.png", "sha256": sha256}
        assert facts["mask_crop"] == 0
        assert "mask_blur" not in facts
        assert facts["settings"]["strength"] == 1
    run = generate("-p", "a cat", *inputs, "--mask-crop", 8, "--mask-blur", 2, "-o", "soft.png")
    facts = recorded("soft.png")[0]
    assert (facts["mask_blur"], facts["mask_crop"]) == (2, 8)
    edge = pixels("soft.png")[15, 24:40], PHOTO[15, 24:40]
    assert (edge[0] != edge[1]).any()


IMAGE = ("--image", "FILES/photo.png")
MASKED = (*IMAGE, "--mask", "FILES/mask.png")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--strength", 0.5), "--strength would be ignored without --image."),
        ((*IMAGE, "--strength", 1.5), "--strength 1.5 is out of range: it is from 0 to 1."),
        (
            (*IMAGE, "--strength", 0),
            "--strength 0 leaves none of 2 steps: raise it, or --steps.",
        ),
        (("--mask", "FILES/mask.png"), "--mask would be ignored without --image."),
        ((*IMAGE, "--mask-blur", 2), "--mask-blur would be ignored without --mask."),
        ((*IMAGE, "--mask-crop", 2), "--mask-crop would be ignored without --mask."),
        ((*MASKED, "--mask-blur", -1), "--mask-blur -1.0 is out of range: it is at least 0."),
        ((*MASKED, "--mask-crop", -1), "--mask-crop -1 is out of range: it is at least 0."),
        (
            (*IMAGE, "--mask", "FILES/flat.png"),
            "--mask is 64x32 and --image is 64x64: they must have the same size.",
        ),
        (
            (*IMAGE, "--mask", "FILES/black.png"),
            "--mask is black everywhere: nothing would be repainted.",
        ),
        (
            ("--image", "FILES/text.png"),
            "--image: The picture FILES/text.png cannot be read: is it one?",
        ),
        ((*IMAGE, "--mask", "FILES/none.png"), "--mask: There is no picture FILES/none.png."),
        (
            (*IMAGE, "--mask", "FILES"),
            "--mask: The picture FILES cannot be read: Is a directory.",
        ),
    ],
)
def test_a_picture_that_cannot_serve_is_refused(generate, files, argv, message):
    """In one sentence that names the option, before weights are read and without any file."""
    named = [str(word).replace("FILES", str(files)) for word in argv]
    run = generate("-p", "a cat", *named)
    assert run.status == 1
    assert run.error == message.replace("FILES", str(files))
    assert list(Path().iterdir()) == []
