from collections.abc import Mapping
from typing import Any

from .._index import read_index
from ..unet.model import SCHEDULERS


def parse_index(fields: Mapping[str, Any]) -> None:
    """Reads `model_index.json`. **Raises:** `ConfigError`."""
    read_index(
        fields,
        pipelines=("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"),
        components={
            "scheduler": SCHEDULERS,
            "text_encoder": ("CLIPTextModel",),
            "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
        },
        # pictures are not checked
        unused=("safety_checker", "feature_extractor", "image_encoder"),
        flags=("requires_safety_checker",),
    )
