"""Pictures from pictures and masks against diffusers: every family, and UNets that inpaint."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_compilations, relative_error
from picture_checks import (
    channels_first,
    check_encoding,
    check_pictures,
    check_reference,
    check_stages,
    compiled_fast,
    load,
    read_reference,
    requests_of,
)
from picture_files import CASES, make_mask

import eqxdiff
from eqxdiff.pictures import mask_to_latent, prepare_mask, to_grey


NAMES = [name for name, case in CASES.items() if "mask" in case]
SHIPPED = ("sd2-nine-soft", "sdxl-inpaint-soft", "dev-inpaint-soft")
"""One case a family, compiled as users compile it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHIPPED])
def test_every_stage_agrees_with_diffusers(name, root):
    with compiled_fast():
        check_encoding(name, root)
        check_stages(name, root)
        check_pictures(name, root)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_stage_agrees_as_users_compile_it(name, root):
    check_encoding(name, root)
    check_stages(name, root)
    check_pictures(name, root)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_sees_prompt_and_picture(name):
    check_reference(name)


# What is kept, and what is repainted.


def test_what_is_kept_is_the_picture(root):
    """Outside the mask the last latents are the encoded picture, to the bit."""
    name = "sd15-inpaint"
    pipe, (request,) = load(name, root), requests_of(CASES[name])
    with compiled_fast():
        latents = eqxdiff.generate(pipe, request).latents
        clean = channels_first([eqxdiff.prepare(pipe, request).blend.clean])
    black = mask_to_latent(prepare_mask(request.mask, 64, 96), 8) == 0
    assert 0.3 < black.mean() < 0.9
    assert np.array_equal(latents[:, :, black], clean[:, :, black])
    assert relative_error(latents[:, :, ~black], clean[:, :, ~black]) > 0.1


def test_a_white_mask_is_image_to_image(root):
    """And a soft one lies between keeping and repainting."""
    name = "sd15-inpaint-soft"
    pipe, request = load(name, root), requests_of(CASES[name])[0]
    with compiled_fast():
        run = lambda grey: (
            eqxdiff.generate(
                pipe, dataclasses.replace(request, mask=np.full((64, 64), grey))
            ).latents
        )
        none = eqxdiff.generate(pipe, dataclasses.replace(request, mask=None)).latents
        kept = channels_first([eqxdiff.prepare(pipe, request).clean])
        assert relative_error(run(1.0), none) < 1e-6
        errors = [relative_error(run(grey), kept) for grey in (0.9, 0.5, 0.1)]
    assert errors[0] > 1.2 * errors[1] > 1.4 * errors[2] > 0


def test_outside_the_crop_no_pixel_changes(root):
    """The part that was worked on is pasted back: where the mask is black, all pixels stay."""
    name = "sd15-inpaint-crop"
    pipe, (request,) = load(name, root), requests_of(CASES[name])
    with compiled_fast():
        (image,) = eqxdiff.generate(pipe, request).images
    pixels, mask = np.asarray(image), request.mask
    assert pixels.shape == request.image.shape
    assert np.array_equal(pixels[mask == 0], request.image[mask == 0])
    assert np.abs(np.int16(pixels) - request.image)[mask == 255].mean() > 10


@pytest.mark.parametrize("crop", [None, 4])
def test_a_blur_softens_the_edge_of_the_mask(crop, root):
    """It is the same as a mask that was blurred before, for sampling as for pasting."""
    name = "sd15-inpaint-crop"
    pipe, (request,) = load(name, root), requests_of(CASES[name], mask_crop=crop)
    hard = np.where(request.mask >= 128, np.uint8(255), np.uint8(0))
    blurred = dataclasses.replace(request, mask=hard, mask_blur=6.0)
    before = dataclasses.replace(request, mask=to_grey(hard, blur=6.0))
    with compiled_fast():
        found, wanted, other = (
            eqxdiff.generate(pipe, one)
            for one in (blurred, before, dataclasses.replace(request, mask=hard))
        )
    assert np.array_equal(found.latents, wanted.latents)
    assert np.array_equal(found.arrays, wanted.arrays)
    assert relative_error(other.latents, wanted.latents) > 1e-3


@pytest.mark.parametrize("name", ["sd15-inpaint-soft", "sd2-nine-soft"])
def test_another_mask_recompiles_nothing(name, root):
    pipe, request = load(name, root), requests_of(CASES[name])[0]
    with compiled_fast():
        first = eqxdiff.generate(pipe, request)
        with count_compilations() as compiled:
            for mask in (make_mask(5, 64, 64), make_mask(5, 64, 64) > 9, request.mask[:, ::-1]):
                other = eqxdiff.generate(pipe, dataclasses.replace(request, mask=mask))
                assert relative_error(other.latents, first.latents) > 1e-3
    assert not compiled


def test_masks_of_one_batch_do_not_mix(root):
    name = "dev-inpaint-soft"
    pipe, requests = load(name, root), requests_of(CASES[name])
    with compiled_fast():
        both = eqxdiff.generate(pipe, requests, batch_size=2).latents
        alone = [eqxdiff.generate(pipe, [one] * 2, batch_size=2).latents[0] for one in requests]
    assert relative_error(np.stack(alone), both) < 1e-5


def test_the_hole_is_grey_for_a_unet_that_inpaints(root):
    """It is told of the picture nothing where the mask is white, half grey or more."""
    name = "sd15-nine"
    pipe, (request,) = load(name, root), requests_of(CASES[name])
    grey = np.where(request.mask, request.image[:, :, 0] // 2 + 128, 0).astype(np.uint8)
    hidden = np.where(request.mask[:, :, None], np.uint8(255) - request.image, request.image)
    told = lambda **changes: eqxdiff.prepare(pipe, dataclasses.replace(request, **changes)).shared
    with compiled_fast():
        first = told(mask=grey)
        assert jnp.array_equal(first.inpaint, told(mask=grey, image=hidden).inpaint)
    seen = read_reference()[f"{name}/masked"][0].transpose(1, 2, 0)
    assert relative_error(first.inpaint[..., 1:], seen) < 1e-4


BLACK = np.zeros((64, 96), np.uint8)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd15-inpaint", {"mask": BLACK}, "`mask` is black everywhere"),
        ("sd15-inpaint", {"mask": BLACK, "mask_crop": 3}, "`mask` is black everywhere"),
        ("sd15-inpaint", {"mask": BLACK[:32] + 255}, "`mask` is 96x32 and `image` is 96x64"),
        ("sd15-inpaint", {"mask": BLACK + 2.0}, "`mask` has values out of range"),
        ("sd15-inpaint", {"mask": np.zeros((64, 96, 3))}, "`mask` has the shape"),
        ("sd15-inpaint", {"mask_blur": -1.0}, "`mask_blur` -1.0 is out of range"),
        ("sd15-inpaint", {"mask_crop": -1}, "`mask_crop` -1 is out of range"),
        ("sd15-inpaint", {"image": None, "strength": None}, "`mask` would be ignored without"),
        ("sd15-nine", {"mask": None}, "made for inpainting: give `image` and `mask`"),
    ],
)
def test_what_cannot_be_is_refused(name, changes, message, root):
    (request,) = requests_of(CASES[name])
    given = {n: v for n, v in changes.items() if n != "strength"}
    kept = {n: v for n, v in request.settings.items() if n not in changes}
    if "image" in changes:
        given["encode_noise"] = None
    pipe, request = load(name, root), dataclasses.replace(request, settings=kept, **given)
    with pytest.raises(eqxdiff.SettingError, match=message):
        eqxdiff.generate(pipe, request)
