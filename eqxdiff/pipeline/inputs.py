"""Input pictures to what the denoiser and the sampler take."""

import dataclasses
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
    Region,
    check_mask,
    crop_region,
    fit,
    mask_to_latent,
    paste,
    prepare_mask,
    to_grey,
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
    image, mask, region = request.image, request.mask, None
    given = {name: getattr(request, name) for name in ("mask", "encode_noise")}
    crop = {"mask_crop": request.mask_crop, "mask_blur": request.mask_blur or None}
    for without, names in (("image", {**given, **crop}), ("mask", crop)):
        wrong = [name for name, value in names.items() if value is not None]
        if getattr(request, without) is None and wrong:
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


def paste_back(request: Request, pixels: Pixels | None, made: np.ndarray) -> np.ndarray:
    """Puts a part that was worked on into its picture, in [0, 1]."""
    if pixels is None or pixels.region is None:
        return made
    assert request.image is not None
    assert request.mask is not None
    mask = to_grey(request.mask, blur=request.mask_blur)
    return to_unit(paste(request.image, made, mask, pixels.region))


def make_inputs(
    blueprint: Blueprint,
    modules: Modules,
    request: Request,
    settings: Any,
    recipe: Recipe,
    pixels: Pixels | None,
    key: PRNGKey,
) -> Inputs:
    """Encodes the input pictures of a request.

    **Arguments:**

    - `modules`: those of the autoencoder's stage; needed where there is an input picture.
    """
    h, w, c = recipe.shape
    controls = tuple(one.resolve(settings, recipe.schedule) for one in request.controls)
    if pixels is None:
        return Inputs(controls=controls)
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
