import json
from collections.abc import Mapping
from typing import Any

from ...text import tiny
from ..unet import tiny as unet_tiny


def files(model: str) -> Mapping[str, str]:
    """The texts of a tiny Stable Diffusion checkpoint, by path: all parts, few features."""
    first = model == "sd15"
    configs = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.30.0.dev0",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", SCHEDULERS[model]["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            **unet_tiny.NOISE,
            **SCHEDULERS[model],
        },
        "text_encoder/config.json": tiny.clip_config(
            hidden_act="quick_gelu" if first else "gelu", projection_dim=24 if first else 32
        ),
        "unet/config.json": {
            **unet_tiny.UNET,
            "attention_head_dim": 4 if first else [2, 4, 4],
            "upcast_attention": model == "sd21",
            "use_linear_projection": not first,
        },
        "vae/config.json": {**unet_tiny.VAE, "scaling_factor": 0.18215},
    }
    return {
        **{path: json.dumps(config, indent=2) for path, config in configs.items()},
        **{
            f"tokenizer/{n}": text
            for n, text in tiny.clip_files("<|endoftext|>" if first else "!").items()
        },
    }


SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "sd15": {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
    "sd2-base": {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
    "sd21-base": {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
    "sd21": {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
    },
    "sd-turbo": {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",
        "use_karras_sigmas": False,
    },
}
