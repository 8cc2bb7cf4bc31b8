"""Stable Diffusion 1 and 2 bound to a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._types import Tokens
from ...sampling import AYS_TABLES
from ...text import Tokenizer
from .._family import Configs
from .._model import PROMPT, Modules, Text
from ..unet.model import AbstractUNetModel, UNetConfigs, check_dims
from ..unet.predictor import UNetCondition
from ..unet.settings import UNetSettings


class ClipTokens(eqx.Module):
    """The tokens of a prompt, and how many of CLIP's last layers are left out."""

    ids: Tokens
    skip: int = eqx.field(static=True)


class SDModel(AbstractUNetModel):
    """Stable Diffusion 1.5, 2, 2.1 or Turbo."""

    name: str = eqx.field(static=True)
    defaults: UNetSettings = eqx.field(static=True)
    configs: UNetConfigs = eqx.field(static=True)
    ays: ClassVar[Sequence[float]] = AYS_TABLES["sd"]
    settings: ClassVar[type[UNetSettings]] = UNetSettings

    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, settings: UNetSettings, role: str
    ) -> Text:
        text = prompt if role == PROMPT else settings.negative_prompt or ""
        tokenized = tokenizers["tokenizer"].encode(text)
        return Text(
            ClipTokens(jnp.asarray(tokenized.ids), settings.clip_skip or 0),
            {"text_encoder": tokenized},
        )

    def encode(
        self, modules: Modules, tokens: ClipTokens, dtype: DTypeLike
    ) -> Float[Array, "tokens dim"]:
        clip = modules["text_encoder"]
        output = clip(tokens.ids, skip=tokens.skip, dtype=dtype)
        return clip.final_layer_norm(output.hidden_state)

    def condition(
        self, encoded: Float[Array, "tokens dim"], settings: UNetSettings, role: str
    ) -> UNetCondition:
        return UNetCondition(encoded, None, jnp.asarray(float(role == PROMPT), jnp.float32))

    def decode_dtype(self, dtype: DTypeLike) -> DTypeLike:
        return dtype


def bind(name: str, defaults: UNetSettings, configs: Configs) -> SDModel:
    """Makes the model of a checkpoint. **Raises:** `ConfigError` where its parts do not fit."""
    own = UNetConfigs.of(configs)
    context = own.unet.cross_attention_dim
    check_dims(
        (
            (
                "The UNet's cross_attention_dim",
                context,
                "CLIP's hidden_size",
                own.text_encoder.hidden_size,
            ),
            ("The UNet's addition_embed_type", own.unet.addition_embed_type, "SD's", None),
        )
    )
    return SDModel(name, defaults, own)
