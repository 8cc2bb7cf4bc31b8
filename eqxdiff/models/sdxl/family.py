import dataclasses
import types
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from ..._errors import ConfigError
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
from .._unet import AddedConditioning, UNet
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
from .conditioning import EncodedPrompt, time_ids
from .config import PipelineConfig, parse_index


BASE = "stabilityai/stable-diffusion-xl-base-1.0"
IDS = 6
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
        Settings(
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


class StableDiffusionXL(AbstractUNetFamily):
    """SDXL base and what is distilled from it (https://arxiv.org/abs/2307.01952)."""

    presets: ClassVar[Mapping[str, Preset]] = types.MappingProxyType(
        {
            "sdxl": Preset(
                "Stable Diffusion XL base 1.0, 2.6 B",
                BASE,
                Settings(steps=50, height=1024, width=1024, guidance=5.0),
                controls=CONTROLS,
            ),
            "sdxl-lightning": dataclasses.replace(LIGHTNING[4], distilled=LIGHTNING),
            "sdxl-turbo": Preset(
                "SDXL-Turbo, 2.6 B, step-distilled",
                "stabilityai/sdxl-turbo",
                Settings(steps=1, height=512, width=512),
                controls=CONTROLS,
            ),
        }
    )
    components: ClassVar[Mapping[str, Component]] = types.MappingProxyType(
        {
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
    tokenizers: ClassVar[Mapping[str, str]] = types.MappingProxyType(
        {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    )
    honoured: ClassVar[Sequence[str]] = (
        *HONOURED,
        "prompt_2",
        "negative_prompt_2",
        "original_size",
        "crop",
        "target_size",
        "negative_original_size",
        "negative_crop",
        "negative_target_size",
    )
    ays: ClassVar[Sequence[float]] = AYS_TABLES["sdxl"]
    controlnet: ClassVar[Component | None] = CONTROL_COMPONENT
    files: ClassVar[PublishedFiles] = files.FILES

    def parse_index(self, fields: Mapping[str, Any]) -> PipelineConfig:
        return parse_index(fields)

    def check(self, configs: Configs) -> None:
        names = "unet", "text_encoder", "text_encoder_2", "vae"
        unet, clip, clip_2, vae = (configs[name] for name in names)
        if unet.addition_embed_type is None:
            raise ConfigError("The UNet's addition_embed_type is null: it is none of SDXL.")
        if not clip_2.has_projection:
            raise ConfigError("text_encoder_2 has no projection, which SDXL is conditioned on.")
        context = clip.hidden_size + clip_2.hidden_size
        added = IDS * unet.addition_time_embed_dim + clip_2.projection_dim
        check_dims(
            (
                ("The UNet's in_channels", unet.in_channels, "the VAE's", vae.latent_channels),
                ("The UNet's out_channels", unet.out_channels, "the VAE's", vae.latent_channels),
                (
                    "The UNet's cross_attention_dim",
                    unet.cross_attention_dim,
                    "the sum of both text encoders' hidden_size",
                    context,
                ),
                (
                    "The UNet's projection_class_embeddings_input_dim",
                    unet.projection_class_embeddings_input_dim,
                    "what six numbers and the pooled prompt come to",
                    added,
                ),
            )
        )

    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, prompt_2: str, settings: Settings
    ) -> dict[str, Tokenized]:
        return {
            "text_encoder": tokenizers["tokenizer"].encode(prompt),
            "text_encoder_2": tokenizers["tokenizer_2"].encode(prompt_2),
        }

    def encode(
        self, modules: Modules, tokens: Mapping[str, Tokens], clip_skip: int, dtype: DTypeLike
    ) -> EncodedPrompt:
        call = lambda name: modules[name](tokens[name], skip=1 + clip_skip, dtype=dtype)
        first, second = call("text_encoder"), call("text_encoder_2")
        context = jnp.concatenate([first.hidden_state, second.hidden_state], axis=-1)
        return EncodedPrompt(context, second.text_embeds)

    def absent(self, configs: Configs, encoded: EncodedPrompt) -> EncodedPrompt:
        if configs["pipeline"].force_zeros_for_empty_prompt:
            return jax.tree.map(jnp.zeros_like, encoded)
        return encoded

    def condition(
        self, settings: Settings, encoded: EncodedPrompt, *, negative: bool
    ) -> Conditioning:
        added = AddedConditioning(encoded.pooled, time_ids(settings, negative=negative))
        wanted = jnp.asarray(0.0 if negative else 1.0, jnp.float32)
        return Conditioning(encoded.context, added, wanted)

    def decode_dtype(self, configs: Configs, dtype: DTypeLike) -> DTypeLike:
        """Float32 where the autoencoder asks for it: in float16 its activations overflow."""
        return jnp.dtype(jnp.float32) if configs["vae"].force_upcast else dtype

    def example(self, model: str) -> Mapping[str, str]:
        return tiny.files(model)
