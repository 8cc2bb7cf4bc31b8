"""Stable Diffusion XL bound to a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from ..._errors import ConfigError
from ...sampling import AYS_TABLES
from ...text import Tokenizer
from .._family import Configs
from .._model import PROMPT, Modules, Text
from ..unet.model import AbstractUNetModel, UNetConfigs, check_dims
from ..unet.network import AddedConditioning
from ..unet.predictor import UNetCondition
from ..unet.settings import UNetSettings
from .conditioning import EncodedPrompt, time_ids
from .settings import SDXLSettings


IDS = 6


class PairTokens(eqx.Module):
    """The tokens of a prompt for both encoders, and how many of the last layers are left out
    besides the last."""

    ids: Int[Array, " tokens"]
    ids_2: Int[Array, " tokens_2"]
    skip: int = eqx.field(static=True)


class SDXLModel(AbstractUNetModel):
    """Stable Diffusion XL, SDXL-Lightning or SDXL-Turbo."""

    name: str = eqx.field(static=True)
    defaults: SDXLSettings = eqx.field(static=True)
    configs: UNetConfigs = eqx.field(static=True)
    ays: ClassVar[Sequence[float]] = AYS_TABLES["sdxl"]
    settings: ClassVar[type[UNetSettings]] = SDXLSettings

    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, settings: SDXLSettings, role: str
    ) -> Text:
        given = prompt, settings.prompt_2
        if role != PROMPT:
            given = settings.negative_prompt, settings.negative_prompt_2
        prompt = given[0] or ""
        first = tokenizers["tokenizer"].encode(prompt)
        second = tokenizers["tokenizer_2"].encode(prompt if given[1] is None else given[1])
        ids, ids_2 = jnp.asarray(first.ids), jnp.asarray(second.ids)
        return Text(
            PairTokens(ids, ids_2, settings.clip_skip or 0),
            {"text_encoder": first, "text_encoder_2": second},
        )

    def encode(self, modules: Modules, tokens: PairTokens, dtype: DTypeLike) -> EncodedPrompt:
        skip = 1 + tokens.skip
        first = modules["text_encoder"](tokens.ids, skip=skip, dtype=dtype)
        second = modules["text_encoder_2"](tokens.ids_2, skip=skip, dtype=dtype)
        context = jnp.concatenate([first.hidden_state, second.hidden_state], axis=-1)
        return EncodedPrompt(context, second.text_embeds)

    def condition(self, encoded: EncodedPrompt, settings: SDXLSettings, role: str) -> UNetCondition:
        negative = role != PROMPT
        absent = settings.negative_prompt is None and settings.negative_prompt_2 is None
        if negative and absent and self.configs.pipeline.force_zeros_for_empty_prompt:
            encoded = jax.tree.map(jnp.zeros_like, encoded)
        ids, wanted = time_ids(settings, negative=negative), jnp.asarray(1.0 - negative)
        return UNetCondition(encoded.context, AddedConditioning(encoded.pooled, ids), wanted)

    def decode_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """Returns float32 where the autoencoder asks for it: in float16 its activations
        overflow."""
        return jnp.dtype(jnp.float32) if self.configs.vae.force_upcast else dtype


def bind(name: str, defaults: SDXLSettings, configs: Configs) -> SDXLModel:
    """Makes the model of a checkpoint. **Raises:** `ConfigError` where its parts do not fit."""
    own, clip_2 = UNetConfigs.of(configs), configs["text_encoder_2"]
    if own.unet.addition_embed_type is None:
        raise ConfigError("The UNet's addition_embed_type is null: it is none of SDXL.")
    if not clip_2.has_projection:
        raise ConfigError("text_encoder_2 has no projection, which SDXL is conditioned on.")
    check_dims(
        (
            (
                "The UNet's cross_attention_dim",
                own.unet.cross_attention_dim,
                "the sum of both text encoders' hidden_size",
                own.text_encoder.hidden_size + clip_2.hidden_size,
            ),
            (
                "The UNet's projection_class_embeddings_input_dim",
                own.unet.projection_class_embeddings_input_dim,
                "what six numbers and the pooled prompt come to",
                IDS * (own.unet.addition_time_embed_dim or 0) + clip_2.projection_dim,
            ),
        )
    )
    return SDXLModel(name, defaults, own)
