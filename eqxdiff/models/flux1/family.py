"""FLUX.1 dev and schnell (https://github.com/black-forest-labs/flux)."""

from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from typing import Any

from ...sampling import parse_flow_config
from ...text import (
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5Encoder,
    forms as text_forms,
    rules as text_rules,
)
from ...vae import AutoencoderKL, AutoencoderKLConfig, forms as vae_forms, rules as vae_rules
from .._example import read_example, read_published
from .._family import Component, Family, Preset
from .._index import read_index
from . import embedded, forms, rules
from .config import TransformerConfig
from .files import FILES
from .lora import LORA
from .model import DEFAULT_GUIDANCE, bind
from .network import Transformer
from .settings import FluxSettings


PRESETS = {
    "flux-dev": Preset(
        "FLUX.1 [dev], 12 B, guidance-distilled",
        "black-forest-labs/FLUX.1-dev",
        FluxSettings(steps=28, guidance=DEFAULT_GUIDANCE),
    ),
    "flux-schnell": Preset(
        "FLUX.1 [schnell], 12 B, step-distilled",
        "black-forest-labs/FLUX.1-schnell",
        FluxSettings(steps=4, max_sequence_length=256),
    ),
    **embedded.presets(),
}


def parse_index(fields: Mapping[str, Any]) -> None:
    """Reads `model_index.json`. **Raises:** `ConfigError`."""
    read_index(
        fields,
        pipelines=("FluxPipeline",),
        components={
            "scheduler": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("T5EncoderModel",),
            "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
            "transformer": ("FluxTransformer2DModel",),
            "vae": ("AutoencoderKL",),
        },
    )


FLUX1 = Family(
    name="flux1",
    settings=FluxSettings,
    presets=PRESETS,
    components={
        "text_encoder": Component(
            CLIPTextConfig.parse, CLIPTextModel.init, text_forms.CLIP, text_rules.CLIP, "text"
        ),
        "text_encoder_2": Component(
            T5Config.parse, T5Encoder.init, text_forms.T5, text_rules.T5, "text"
        ),
        "transformer": Component(
            TransformerConfig.parse,
            Transformer.init,
            forms.TRANSFORMER,
            rules.TRANSFORMER,
            "denoiser",
        ),
        "vae": Component(
            AutoencoderKLConfig.parse,
            AutoencoderKL.init,
            vae_forms.AUTOENCODER,
            vae_rules.AUTOENCODER,
            "vae",
        ),
    },
    tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    parse_index=parse_index,
    parse_scheduler=partial(parse_flow_config, name="scheduler/scheduler_config.json"),
    bind=bind,
    example=partial(read_example, files("eqxdiff.models.flux1") / "example.json"),
    published=partial(read_published, files("eqxdiff.models.flux1")),
    files=FILES,
    lora=LORA,
)
