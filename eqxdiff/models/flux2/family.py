"""FLUX.2 [klein] 4B and 9B, distilled and base (https://github.com/black-forest-labs/flux2)."""

from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from typing import Any

from ...sampling import parse_flow_config
from ...text import Qwen3Encoder, forms as text_forms, rules as text_rules
from ...vae import forms as vae_forms, rules as vae_rules
from .._example import read_example, read_published
from .._family import Component, Family, Preset
from .._index import read_index
from . import forms, rules
from .autoencoder import AutoencoderKLFlux2
from .config import AutoencoderKLFlux2Config, Flux2TransformerConfig
from .files import FILES
from .lora import LORA
from .model import bind, parse_encoder, references
from .network import Flux2Transformer
from .settings import Flux2Settings


DISTILLED = Flux2Settings(steps=4)
BASE = Flux2Settings(steps=50, guidance=4.0)

PRESETS = {
    "flux2-klein-4b": Preset(
        "FLUX.2 [klein], 4 B, step-distilled", "black-forest-labs/FLUX.2-klein-4B", DISTILLED
    ),
    "flux2-klein-9b": Preset(
        "FLUX.2 [klein], 9 B, step-distilled", "black-forest-labs/FLUX.2-klein-9B", DISTILLED
    ),
    "flux2-klein-base-4b": Preset(
        "FLUX.2 [klein], 4 B, guided", "black-forest-labs/FLUX.2-klein-base-4B", BASE
    ),
    "flux2-klein-base-9b": Preset(
        "FLUX.2 [klein], 9 B, guided", "black-forest-labs/FLUX.2-klein-base-9B", BASE
    ),
}


def parse_index(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `model_index.json`. **Raises:** `ConfigError`."""
    return read_index(
        fields,
        pipelines=("Flux2KleinPipeline",),
        components={
            "scheduler": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
            "text_encoder": ("Qwen3ForCausalLM", "Qwen3Model"),
            "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
            "transformer": ("Flux2Transformer2DModel",),
            "vae": ("AutoencoderKLFlux2",),
        },
        flags=("is_distilled",),
    )


FLUX2 = Family(
    name="flux2",
    settings=Flux2Settings,
    presets=PRESETS,
    components={
        "text_encoder": Component(
            parse_encoder,
            Qwen3Encoder.init,
            text_forms.QWEN3,
            text_rules.QWEN3,
            "text",
        ),
        "transformer": Component(
            Flux2TransformerConfig.parse,
            Flux2Transformer.init,
            forms.TRANSFORMER,
            rules.TRANSFORMER,
            "denoiser",
        ),
        "vae": Component(
            AutoencoderKLFlux2Config.parse,
            AutoencoderKLFlux2.init,
            vae_forms.AUTOENCODER,
            vae_rules.AUTOENCODER,
            "vae",
        ),
    },
    tokenizers={"tokenizer": "text_encoder"},
    parse_index=parse_index,
    parse_scheduler=partial(parse_flow_config, name="scheduler/scheduler_config.json"),
    bind=bind,
    example=partial(read_example, files("eqxdiff.models.flux2") / "example.json"),
    published=partial(read_published, files("eqxdiff.models.flux2")),
    files=FILES,
    lora=LORA,
    references=references,
)
