"""Input pictures to what the denoiser and the sampler take."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._errors import SettingError
from .._types import PRNGKey
from ..models import Inputs, Modules, Recipe, tiles
from ..pictures import (
    Pictured,
    Region,
    check_mask,
    crop_region,
    fit,
    mask_to_latent,
    paste,
    prepare_mask,
    resize_and_cut,
    to_grey,
    to_pil,
    to_signed,
    to_unit,
)
from .blueprint import Blueprint
from .request import Request, check_noise


ENCODING = 2**20
"""The encoding noise is drawn with the picture's key and this number; steps have smaller ones."""

STRENGTH = 0.6
"""How much of an input picture is made anew by default, without a mask."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """The input picture of a request, and where it is made anew.

    **Fields:**

    - `image`: float32, `(height, width, 3)`, from -1 to 1, of the size of the settings.
    - `mask`: float32, `(height, width)`, from 0 to 1; 1 is made anew.
    - `region`: of a picture that is worked on in part: left, top, right and bottom.
    """

    image: np.ndarray
    mask: np.ndarray | None
    region: Region | None


def read_pixels(request: Request, settings: Any) -> Pixels | None:
    """Prepares the input picture of a request; `None` where there is none.

    **Raises:** `SettingError` where picture and mask do not belong together.
    """
    image, mask, region = next(iter(request.images), None), request.mask, None
    given = {name: getattr(request, name) for name in ("mask", "encode_noise")}
    crop = {"mask_crop": request.mask_crop, "mask_blur": request.mask_blur or None}
    for without, names in (("image", {**given, **crop}), ("mask", crop)):
        wrong = [name for name, value in names.items() if value is not None]
        if {"image": image, "mask": mask}[without] is None and wrong:
            raise SettingError(f"`{wrong[0]}` would be ignored without `{without}`.")
    if image is None:
        return None
    size = settings.height, settings.width
    if mask is None:
        return Pixels(to_signed(fit(image, *size)), None, None)
    check_mask(mask, image)
    if request.mask_crop is not None:
        grey = to_grey(mask, blur=request.mask_blur)
        region = crop_region(grey, settings.width, settings.height, request.mask_crop)
    soft = prepare_mask(mask, *size, blur=request.mask_blur, region=region)
    return Pixels(to_signed(fit(image, *size, region=region)), soft, region)


def one_image(blueprint: Blueprint, request: Request) -> Pictured | None:
    """Returns the picture to begin with; `None` for models that take reference pictures.

    **Raises:** `SettingError` where there are several.
    """
    if blueprint.references is not None:
        return None
    if (count := len(request.images)) > 1:
        raise SettingError(
            f"There are {count} pictures for `image`, and {blueprint.name} begins with one."
        )
    return next(iter(request.images), None)


def read_references(blueprint: Blueprint, request: Request) -> tuple[np.ndarray, ...]:
    """Prepares the reference pictures of a request, float32 from -1 to 1; none for other models.

    **Raises:** `SettingError` where there are too many or one has an unusable size, or where
    something is given that belongs to models which begin with a picture.
    """
    takes, name = blueprint.references, blueprint.name
    if takes is None:
        return ()
    parts = {field: getattr(request, field) for field in ("mask", "mask_crop", "encode_noise")}
    for field, value in {**parts, "strength": request.settings.get("strength")}.items():
        if value is not None:
            raise SettingError(
                f"{name} would ignore `{field}`: it makes whole pictures anew, after those in "
                "`image` and the prompt."
            )
    takes.check_count(len(request.images), name)
    pictures = [to_pil(image) for image in request.images]
    cuts = [resize_and_cut(picture, *takes.sizes(*picture.size)) for picture in pictures]
    return tuple(to_signed(cut) for cut in cuts)


def paste_back(request: Request, pixels: Pixels | None, made: np.ndarray) -> np.ndarray:
    """Puts a part that was worked on into its picture, in [0, 1]."""
    if pixels is None or pixels.region is None:
        return made
    assert request.mask is not None
    (image,) = request.images
    mask = to_grey(request.mask, blur=request.mask_blur)
    return to_unit(paste(image, made, mask, pixels.region))


def make_inputs(
    blueprint: Blueprint,
    modules: Modules,
    request: Request,
    settings: Any,
    recipe: Recipe,
    pixels: Pixels | None,
    references: Sequence[np.ndarray],
    key: PRNGKey,
) -> Inputs:
    """Encodes the input pictures of a request.

    **Arguments:**

    - `modules`: those of the autoencoder's stage; needed where there is an input picture.
    """
    h, w, c = recipe.shape
    controls = tuple(one.resolve(settings, recipe.schedule) for one in request.controls)
    if pixels is None:
        refer = lambda picture: _encode_reference(blueprint, modules, picture, settings, recipe)
        return Inputs(controls=controls, references=tuple(map(refer, references)))
    if request.encode_noise is None:
        noise = jax.random.normal(jax.random.fold_in(key, ENCODING), (c, h, w), jnp.float32)
    else:
        check_noise("encode_noise", request.encode_noise, (c, h, w))
        noise = jnp.asarray(request.encode_noise, jnp.float32)
    noise = noise.transpose(1, 2, 0)

    def encode(image: np.ndarray) -> Array:
        return encode_image(blueprint, modules, jnp.asarray(image), noise, tiles(settings))

    latent, mask, masked = encode(pixels.image), None, None
    if pixels.mask is not None:
        mask = jnp.asarray(mask_to_latent(pixels.mask, pixels.mask.shape[0] // h))[..., None]
        if blueprint.model.inpaints:
            masked = encode(pixels.image * (pixels.mask < 0.5)[..., None])
    return Inputs(latent, mask, masked, controls)


def _encode_reference(
    blueprint: Blueprint,
    modules: Modules,
    image: np.ndarray,
    settings: Any,
    recipe: Recipe,
) -> Float[Array, "h w c"]:
    """Returns the mean of a picture's latent: the latent without noise."""
    scale, channels = settings.height // recipe.shape[0], recipe.shape[2]
    none = jnp.zeros((image.shape[0] // scale, image.shape[1] // scale, channels), jnp.float32)
    return encode_image(blueprint, modules, jnp.asarray(image), none, tiles(settings))


@eqx.filter_jit
def encode_image(
    blueprint: Blueprint,
    modules: Modules,
    image: Float[Array, "H W 3"],
    noise: Float[Array, "h w c"],
    tiled: bool,
) -> Float[Array, "h w c"]:
    """Encodes one picture from -1 to 1 to a latent."""
    with blueprint.computing():
        dtype = blueprint.compute_dtype
        return blueprint.model.to_latent(modules, image, noise, dtype, tiled=tiled)
