import dataclasses
from collections.abc import Mapping
from typing import Any

from ..._config import parse_config
from .._index import read_index
from ..unet.model import SCHEDULERS


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The flags in `model_index.json`.

    **Fields:**

    - `force_zeros_for_empty_prompt`: whether an absent negative prompt is zeros rather than the
        encoded empty text.
    """

    force_zeros_for_empty_prompt: bool = True


def parse_index(fields: Mapping[str, Any]) -> PipelineConfig:
    """Reads `model_index.json`. **Raises:** `ConfigError`."""
    flags = read_index(
        fields,
        pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"),
        components={
            "scheduler": SCHEDULERS,
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
        },
        unused=("feature_extractor", "image_encoder"),
        flags=("force_zeros_for_empty_prompt", "add_watermarker"),
    )
    # no watermark is written
    return parse_config(
        PipelineConfig, flags, name="model_index.json", ignored=("add_watermarker",)
    )
