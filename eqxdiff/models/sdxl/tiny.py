import json
from collections.abc import Mapping
from typing import Any

from ...text import tiny
from ..unet import tiny as unet_tiny


def files(model: str) -> Mapping[str, str]:
    """The texts of a tiny SDXL checkpoint, by path: all parts, few features."""
    scheduler = SCHEDULERS[model]
    configs = {
        "model_index.json": {
            "_class_name": "StableDiffusionXLPipeline",
            "_diffusers_version": "0.30.0.dev0",
            "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {**unet_tiny.NOISE, **scheduler},
        "text_encoder/config.json": tiny.clip_config(
            hidden_size=12, projection_dim=12, intermediate_size=24
        ),
        "text_encoder_2/config.json": tiny.clip_config(
            architectures=["CLIPTextModelWithProjection"],
            hidden_act="gelu",
            hidden_size=20,
            intermediate_size=40,
            projection_dim=10,
        ),
        "unet/config.json": {**unet_tiny.UNET, **ADDED},
        "vae/config.json": {
            **unet_tiny.VAE,
            "force_upcast": True,
            "sample_size": 1024,
            "scaling_factor": 0.13025,
        },
    }
    return {
        **{path: json.dumps(config, indent=2) for path, config in configs.items()},
        **{f"tokenizer/{name}": text for name, text in tiny.clip_files().items()},
        **{f"tokenizer_2/{name}": text for name, text in tiny.clip_files("!").items()},
    }


ADDED: Mapping[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 8,
    "attention_head_dim": [2, 4, 4],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
    "transformer_layers_per_block": [1, 2, 3],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
"""What the UNet has that those before it had not."""

EULER: Mapping[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}

SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "sdxl": EULER,
    "sdxl-lightning": EULER,
    "sdxl-turbo": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "timestep_spacing": "trailing",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
}
