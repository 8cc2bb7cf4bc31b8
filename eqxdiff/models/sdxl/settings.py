"""The settings of Stable Diffusion XL."""

import dataclasses
from typing import ClassVar

from .._settings import setting
from ..unet.settings import UNetSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDXLSettings(UNetSettings):
    """The settings of Stable Diffusion, a prompt for the second encoder, and sizes.

    SDXL is conditioned on the original size of a picture, on its crop and on its size
    (https://arxiv.org/abs/2307.01952, section 2.2). Sizes are height and width, in pixels.
    """

    components: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "unet", "vae")

    prompt_2: str | None = setting(
        "The prompt for the second text encoder.",
        "Picture",
        absent="the prompt",
        a1111=lambda value: {"Prompt 2": value},
    )
    negative_prompt_2: str | None = setting(
        "The negative prompt for the second text encoder.",
        "Guidance",
        absent="the negative prompt",
        guided=True,
        a1111=lambda value: {"Negative prompt 2": value},
    )
    original_size: tuple[int, int] | None = setting(
        "The original size of the picture, as a condition of the model.",
        "Picture",
        form="WIDTHxHEIGHT",
        absent="the picture's",
    )
    crop: tuple[int, int] | None = setting(
        "The pixels cut off at the top and on the left, as a condition of the model.",
        "Picture",
        form="TOP,LEFT",
        absent="0,0",
    )
    target_size: tuple[int, int] | None = setting(
        "The size of the picture, as a condition of the model.",
        "Picture",
        form="WIDTHxHEIGHT",
        absent="the picture's",
    )
    negative_original_size: tuple[int, int] | None = setting(
        "The original size that guidance leads away from.",
        "Guidance",
        form="WIDTHxHEIGHT",
        absent="the original size",
        guided=True,
    )
    negative_crop: tuple[int, int] | None = setting(
        "The crop that guidance leads away from.",
        "Guidance",
        form="TOP,LEFT",
        absent="the crop",
        guided=True,
    )
    negative_target_size: tuple[int, int] | None = setting(
        "The target size that guidance leads away from.",
        "Guidance",
        form="WIDTHxHEIGHT",
        absent="the target size",
        guided=True,
    )
