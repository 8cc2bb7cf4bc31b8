"""SDXL base and what is distilled from it (https://arxiv.org/abs/2307.01952)."""

import dataclasses
from functools import partial
from importlib.resources import files

from ...sampling import parse_discrete_config
from ...text import CLIPTextConfig, CLIPTextModel, forms as text_forms, rules as text_rules
from ...vae import AutoencoderKL, AutoencoderKLConfig, forms as vae_forms, rules as vae_rules
from .._example import read_example, read_published
from .._family import Component, Family, Preset
from ..unet import forms as unet_forms
from ..unet.config import UNetConfig
from ..unet.model import CONTROL_COMPONENT, control_config
from ..unet.network import UNet
from ..unet.rules import UNET
from .config import parse_index
from .files import FILES
from .lora import LORA
from .model import bind
from .settings import SDXLSettings


BASE = "stabilityai/stable-diffusion-xl-base-1.0"
CONTROLS = {
    "canny": "diffusers/controlnet-canny-sdxl-1.0",
    "depth": "diffusers/controlnet-depth-sdxl-1.0",
    "openpose": "thibaud/controlnet-openpose-sdxl-1.0",
}


def lightning(steps: int, file: str, prediction_type: str | None = None) -> Preset:
    """SDXL-Lightning for a number of steps (https://arxiv.org/abs/2402.13929)."""
    return Preset(
        "SDXL-Lightning, 2.6 B, distilled to 1, 2, 4 or 8 steps",
        BASE,
        SDXLSettings(
            steps=steps,
            height=1024,
            width=1024,
            sampler="euler",
            timestep_spacing="trailing",
            prediction_type=prediction_type,
        ),
        parts={"unet": f"ByteDance/SDXL-Lightning:{file}"},
        controls=CONTROLS,
    )


LIGHTNING = {
    1: lightning(1, "sdxl_lightning_1step_unet_x0.safetensors", "sample"),
    2: lightning(2, "sdxl_lightning_2step_unet.safetensors"),
    4: lightning(4, "sdxl_lightning_4step_unet.safetensors"),
    8: lightning(8, "sdxl_lightning_8step_unet.safetensors"),
}


PRESETS = {
    "sdxl": Preset(
        "Stable Diffusion XL base 1.0, 2.6 B",
        BASE,
        SDXLSettings(steps=50, height=1024, width=1024, guidance=5.0),
        controls=CONTROLS,
    ),
    "sdxl-lightning": dataclasses.replace(LIGHTNING[4], distilled=LIGHTNING),
    "sdxl-turbo": Preset(
        "SDXL-Turbo, 2.6 B, step-distilled",
        "stabilityai/sdxl-turbo",
        SDXLSettings(steps=1, height=512, width=512),
        controls=CONTROLS,
    ),
}

STABLE_DIFFUSION_XL = Family(
    name="sdxl",
    settings=SDXLSettings,
    presets=PRESETS,
    components={
        "text_encoder": Component(
            CLIPTextConfig.parse, CLIPTextModel.init, text_forms.CLIP, text_rules.CLIP, "text"
        ),
        "text_encoder_2": Component(
            partial(CLIPTextConfig.parse, name="text_encoder_2/config.json"),
            CLIPTextModel.init,
            text_forms.CLIP,
            text_rules.CLIP,
            "text",
        ),
        "unet": Component(UNetConfig.parse, UNet.init, unet_forms.UNET, UNET, "denoiser"),
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
    parse_scheduler=partial(parse_discrete_config, name="scheduler/scheduler_config.json"),
    bind=bind,
    example=partial(read_example, files("eqxdiff.models.sdxl") / "example.json"),
    published=partial(read_published, files("eqxdiff.models.sdxl")),
    files=FILES,
    lora=LORA,
    controlnet=CONTROL_COMPONENT,
    control_config=control_config,
)
