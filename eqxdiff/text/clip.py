"""The text encoder of CLIP (https://arxiv.org/abs/2103.00020), OpenAI's and OpenCLIP's.

Source: `CLIPTextModel` and `CLIPTextModelWithProjection` of transformers,
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/clip/modeling_clip.py
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, PyTree

from .._config import parse_config
from .._types import PRNGKey, Tokens
from ..kernels import attention
from ..nn import (
    AbstractLinear,
    Embedding,
    Keep,
    LayerNorm,
    Linear,
    everything,
    fold,
    gelu_erf,
    nothing,
    quick_gelu,
    stack,
)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu_erf}
HIGHEST_ID = 2
"""Old configs state this `eos_token_id` falsely: their texts end at the highest token id."""


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The sizes of a CLIP text encoder, named as in `text_encoder/config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    projection_dim: int | None = None
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    architectures: tuple[str, ...] = ("CLIPTextModel",)

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act: {self.hidden_act!r} is not supported, only 'quick_gelu' or 'gelu'"
            )
        if self.architectures not in (("CLIPTextModel",), ("CLIPTextModelWithProjection",)):
            raise ValueError(
                f"architectures: {list(self.architectures)} is not supported, only "
                "['CLIPTextModel'] or ['CLIPTextModelWithProjection']"
            )
        if self.has_projection and self.projection_dim is None:
            raise ValueError("projection_dim: missing, and CLIPTextModelWithProjection has one")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def has_projection(self) -> bool:
        return self.architectures == ("CLIPTextModelWithProjection",)

    @classmethod
    def parse(cls, fields: Mapping[str, Any], *, name: str = "text_encoder/config.json") -> Self:
        """Reads a `config.json`, which the errors call `name`. **Raises:** `ConfigError`."""
        return parse_config(
            cls,
            fields,
            name=name,
            supported={"model_type": ("clip_text_model",)},
            ignored=(
                *("attention_dropout", "dropout", "initializer_factor", "initializer_range"),
                *("bos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version"),
                *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
                *("gradient_checkpointing", "tie_word_embeddings", "torchscript"),
            ),
        )


class CLIPOutput(NamedTuple):
    """The states of a CLIP text encoder, of which each family takes its own."""

    last_hidden_state: Float[Array, "tokens dim"]
    """The state after all layers and the final norm."""

    hidden_state: Float[Array, "tokens dim"]
    """The state after all but the last `skip` layers, without the final norm."""

    pooled: Float[Array, " dim"]
    """The last hidden state at the token that ends the text."""

    text_embeds: Float[Array, " projected"] | None
    """The projection of `pooled`, or `None` for an encoder without a projection."""


class CLIPEmbeddings(eqx.Module):
    """A vector for each token plus one for each position."""

    token_embedding: Embedding
    position_embedding: Embedding
    positions: int = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: CLIPTextConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        token_key, position_key = jax.random.split(key)
        dim, length = cfg.hidden_size, cfg.max_position_embeddings
        return cls(
            Embedding.init(cfg.vocab_size, dim, key=token_key, dtype=dtype),
            Embedding.init(length, dim, key=position_key, dtype=dtype),
            length,
        )

    def __call__(self, tokens: Tokens, dtype: DTypeLike | None) -> Float[Array, "tokens dim"]:
        """Embeds tokens in `dtype`, or in the dtype of their table.

        **Raises:** `ValueError` where there are more tokens than positions.
        """
        if tokens.shape[0] > self.positions:
            raise ValueError(
                f"{tokens.shape[0]} tokens are more than the {self.positions} positions."
            )
        token = self.token_embedding(tokens)
        position = self.position_embedding(jnp.arange(tokens.shape[0]))
        dtype = token.dtype if dtype is None else dtype
        return token.astype(dtype) + position.astype(dtype)


class CLIPAttention(eqx.Module):
    """Multi-head self-attention, with biases."""

    q_proj: AbstractLinear
    k_proj: AbstractLinear
    v_proj: AbstractLinear
    out_proj: AbstractLinear
    heads: int = eqx.field(static=True)

    @classmethod
    def init(cls, dim: int, heads: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys = jax.random.split(key, 4)
        q, k, v, out = (Linear.init(dim, dim, key=k, dtype=dtype) for k in keys)
        return cls(q, k, v, out, heads)

    def __call__(
        self, x: Float[Array, "tokens dim"], mask: Bool[Array, "1 tokens tokens"]
    ) -> Float[Array, "tokens dim"]:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(x).reshape(x.shape[0], self.heads, -1) for proj in projections)
        return self.out_proj(attention(q, k, v, mask=mask).reshape(x.shape))


class CLIPMLP(eqx.Module):
    """Linear, activation, linear."""

    fc1: AbstractLinear
    fc2: AbstractLinear
    hidden_act: str = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: CLIPTextConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        key1, key2 = jax.random.split(key)
        dim, hidden = cfg.hidden_size, cfg.intermediate_size
        return cls(
            Linear.init(dim, hidden, key=key1, dtype=dtype),
            Linear.init(hidden, dim, key=key2, dtype=dtype),
            cfg.hidden_act,
        )

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class CLIPLayer(eqx.Module):
    """A pre-norm transformer layer."""

    layer_norm1: LayerNorm
    self_attn: CLIPAttention
    layer_norm2: LayerNorm
    mlp: CLIPMLP

    @classmethod
    def init(cls, cfg: CLIPTextConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        attn_key, mlp_key = jax.random.split(key)
        dim, heads = cfg.hidden_size, cfg.num_attention_heads
        return cls(
            LayerNorm.init(dim, eps=cfg.layer_norm_eps, dtype=dtype),
            CLIPAttention.init(dim, heads, key=attn_key, dtype=dtype),
            LayerNorm.init(dim, eps=cfg.layer_norm_eps, dtype=dtype),
            CLIPMLP.init(cfg, key=mlp_key, dtype=dtype),
        )

    def __call__(
        self, x: Float[Array, "tokens dim"], mask: Bool[Array, "1 tokens tokens"]
    ) -> Float[Array, "tokens dim"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(eqx.Module):
    """The layers, stacked."""

    layers: CLIPLayer
    depth: int = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: CLIPTextConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        layer = lambda key: CLIPLayer.init(cfg, key=key, dtype=dtype)
        return cls(stack(layer, cfg.num_hidden_layers, key=key), cfg.num_hidden_layers)

    def __call__(
        self, x: Float[Array, "tokens dim"], skip: int, *, remat: bool, keep: Keep
    ) -> tuple[Float[Array, "tokens dim"], Float[Array, "tokens dim"], PyTree]:
        """Returns the states after all layers and after all but the last `skip`, and `keep(x)`
        after each layer.

        **Raises:** `ValueError` where there are fewer than `skip` layers.
        """
        if not 0 <= skip <= self.depth:
            raise ValueError(f"`skip` {skip} is out of range: the encoder has {self.depth} layers.")
        mask = jnp.tri(x.shape[0], dtype=bool)[None]

        def apply(layer, carry):
            index, x, kept = carry
            x = layer(x, mask)
            return index + 1, x, jnp.where(index + 1 == self.depth - skip, x, kept)

        start = jnp.zeros((), jnp.int32), x, x
        of_x = lambda carry: keep(carry[1])
        (_, x, kept), seen = fold(self.layers, start, apply, remat=remat, keep=of_x)
        return x, kept, seen


class CLIPTextModel(eqx.Module):
    """A CLIP text encoder, with or without a projection of the pooled state."""

    embeddings: CLIPEmbeddings
    encoder: CLIPEncoder
    final_layer_norm: LayerNorm
    text_projection: AbstractLinear | None
    eos_token_id: int = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: CLIPTextConfig, *, key: PRNGKey, dtype: DTypeLike = jnp.float32) -> Self:
        """Makes a random encoder with weights of `dtype`."""
        keys = jax.random.split(key, 3)
        projection = None
        if cfg.has_projection:
            assert cfg.projection_dim is not None
            dims = cfg.hidden_size, cfg.projection_dim
            projection = Linear.init(*dims, bias=False, key=keys[2], dtype=dtype)
        return cls(
            CLIPEmbeddings.init(cfg, key=keys[0], dtype=dtype),
            CLIPEncoder.init(cfg, key=keys[1], dtype=dtype),
            LayerNorm.init(cfg.hidden_size, eps=cfg.layer_norm_eps, dtype=dtype),
            projection,
            cfg.eos_token_id,
        )

    def __call__(
        self,
        tokens: Tokens,
        *,
        skip: int = 0,
        dtype: DTypeLike | None = None,
        remat: bool = False,
    ) -> CLIPOutput:
        """Encodes one prompt.

        **Arguments:**

        - `tokens`: the ids, with start and end token, padded; at most `max_position_embeddings`.
        - `skip`: how many of the last layers `hidden_state` leaves out. 1 gives the penultimate
            state, `hidden_states[-2]` in transformers.
        - `dtype`: the dtype of the activations, by default the dtype of the token embeddings.
        - `remat`: recompute each layer in the backward pass.

        **Raises:** `ValueError` where there are more tokens than positions, or fewer layers than
        `skip`.
        """
        return self.capture(tokens, skip=skip, dtype=dtype, remat=remat, keep=nothing)[0]

    def capture(
        self,
        tokens: Tokens,
        *,
        skip: int = 0,
        dtype: DTypeLike | None = None,
        remat: bool = False,
        keep: Keep = everything,
    ) -> tuple[CLIPOutput, PyTree]:
        """Does what `__call__` does, and also returns `keep(x)` after every layer, stacked.

        `keep` is that of `nn.fold`: by default the whole output of the layer.
        """
        x = self.embeddings(tokens, dtype)
        x, hidden_state, seen = self.encoder(x, skip, remat=remat, keep=keep)
        last_hidden_state = self.final_layer_norm(x)
        if self.eos_token_id == HIGHEST_ID:
            end = jnp.argmax(tokens)
        else:
            end = jnp.argmax(tokens == self.eos_token_id)
        pooled = last_hidden_state[end]
        text_embeds = None if self.text_projection is None else self.text_projection(pooled)
        return CLIPOutput(last_hidden_state, hidden_state, pooled, text_embeds), seen
