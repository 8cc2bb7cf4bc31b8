"""The decoder of Qwen3 (https://arxiv.org/abs/2505.09388), as far as its states are read.

Diffusion models read the states between layers of a language model, so the layers after the last
one read, the last norm and the head are neither loaded nor run.

Source: `Qwen3Model` of transformers,
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen3/modeling_qwen3.py
On text alone the text model of Qwen3-VL computes the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from .._config import parse_config
from .._types import PRNGKey, Tokens
from ..kernels import attention
from ..nn import (
    AbstractLinear,
    Embedding,
    Linear,
    RMSNorm,
    apply_rope,
    fold,
    rope,
    silu,
    stack,
)


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """The sizes of a Qwen3 decoder, named as in `text_encoder/config.json`.

    `taps` says which states are read: 1 is the output of the first layer. A negative number counts
    from the end, as in the list of all hidden states, which begins with the embedding.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    taps: tuple[int, ...]
    head_dim: int = 128
    vocab_size: int = 151936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is not even")
        if self.depth >= self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers: {self.num_hidden_layers} is not above {self.depth}, the "
                "number of layers that this model reads"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """The taps, each as the number of layers that come before."""
        end = self.num_hidden_layers + 1
        return tuple(tap if tap > 0 else end + tap for tap in self.taps)

    @property
    def depth(self) -> int:
        """The number of layers that are run."""
        return max(self.levels)

    @classmethod
    def parse(
        cls,
        fields: Mapping[str, Any],
        *,
        taps: tuple[int, ...],
        name: str = "text_encoder/config.json",
    ) -> Self:
        """Reads a `config.json`, which the errors call `name`. **Raises:** `ConfigError`."""
        fields = dict(fields.get("text_config", fields))
        scaled = fields.pop("rope_parameters", None) or {}
        if "rope_theta" in scaled:
            fields["rope_theta"] = scaled["rope_theta"]
        kind = (scaled or fields.get("rope_scaling") or {}).get("rope_type", "default")
        layers = fields.get("num_hidden_layers")
        full = ("full_attention",) * (layers if type(layers) is int else 0)
        return parse_config(
            cls,
            {**fields, "taps": list(taps), "rope_type": kind},
            name=name,
            supported={
                "model_type": ("qwen3", "qwen3_vl_text"),
                "hidden_act": ("silu",),
                "attention_bias": (False,),
                "use_sliding_window": (False,),
                "layer_types": (None, full),
                "rope_type": ("default",),
            },
            ignored=(
                *("architectures", "attention_dropout", "initializer_range", "rope_scaling"),
                *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
                *("max_position_embeddings", "max_window_layers", "sliding_window", "use_cache"),
                *("torch_dtype", "dtype", "transformers_version"),
            ),
        )


class Qwen3Attention(eqx.Module):
    """Causal attention in which several heads of queries share one of keys and values."""

    q_proj: AbstractLinear
    k_proj: AbstractLinear
    v_proj: AbstractLinear
    o_proj: AbstractLinear
    q_norm: RMSNorm
    k_norm: RMSNorm

    @classmethod
    def init(cls, cfg: Qwen3Config, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        inner, shared = (
            cfg.head_dim * heads for heads in (cfg.num_attention_heads, cfg.num_key_value_heads)
        )
        linear = lambda i, o, key: Linear.init(i, o, bias=False, key=key, dtype=dtype)
        return cls(
            linear(cfg.hidden_size, inner, q_key),
            linear(cfg.hidden_size, shared, k_key),
            linear(cfg.hidden_size, shared, v_key),
            linear(inner, cfg.hidden_size, o_key),
            RMSNorm.init(cfg.head_dim, eps=cfg.rms_norm_eps, dtype=dtype),
            RMSNorm.init(cfg.head_dim, eps=cfg.rms_norm_eps, dtype=dtype),
        )

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        pe: Float[Array, "tokens 2 half"],
        length: Int[Array, ""],
    ) -> Float[Array, "tokens dim"]:
        tokens, head_dim = x.shape[0], 2 * pe.shape[2]
        q, k, v = (
            proj(x).reshape(tokens, -1, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = apply_rope(self.q_norm(q), pe, order="halves")
        k = apply_rope(self.k_norm(k), pe, order="halves")
        causal = jnp.tri(tokens, dtype=bool)[None]
        out = attention(q, k, v, mask=causal, key_length=length)
        return self.o_proj(out.reshape(tokens, -1))


class Qwen3MLP(eqx.Module):
    """Computes `down(silu(gate x) * up x)` (https://arxiv.org/abs/2002.05202)."""

    gate_proj: AbstractLinear
    up_proj: AbstractLinear
    down_proj: AbstractLinear

    @classmethod
    def init(cls, cfg: Qwen3Config, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        gate_key, up_key, down_key = jax.random.split(key, 3)
        linear = lambda i, o, key: Linear.init(i, o, bias=False, key=key, dtype=dtype)
        return cls(
            linear(cfg.hidden_size, cfg.intermediate_size, gate_key),
            linear(cfg.hidden_size, cfg.intermediate_size, up_key),
            linear(cfg.intermediate_size, cfg.hidden_size, down_key),
        )

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen3Layer(eqx.Module):
    """A pre-norm transformer block."""

    input_layernorm: RMSNorm
    self_attn: Qwen3Attention
    post_attention_layernorm: RMSNorm
    mlp: Qwen3MLP

    @classmethod
    def init(cls, cfg: Qwen3Config, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        attention_key, mlp_key = jax.random.split(key)
        norm = lambda: RMSNorm.init(cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)
        attn = Qwen3Attention.init(cfg, key=attention_key, dtype=dtype)
        return cls(norm(), attn, norm(), Qwen3MLP.init(cfg, key=mlp_key, dtype=dtype))

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        pe: Float[Array, "tokens 2 half"],
        length: Int[Array, ""],
    ) -> Float[Array, "tokens dim"]:
        x = x + self.self_attn(self.input_layernorm(x), pe, length)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Encoder(eqx.Module):
    """Embedding and layers; the states at the taps are the result.

    - `levels`: the taps, each as the number of layers that come before.
    """

    embed_tokens: Embedding
    layers: Qwen3Layer
    levels: tuple[int, ...] = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    rope_theta: float = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: Qwen3Config, *, key: PRNGKey, dtype: DTypeLike = jnp.float32) -> Self:
        """Makes a random encoder, with as many layers as are run, stacked along a leading axis."""
        embedding_key, layers_key = jax.random.split(key)
        layer = lambda key: Qwen3Layer.init(cfg, key=key, dtype=dtype)
        return cls(
            Embedding.init(cfg.vocab_size, cfg.hidden_size, key=embedding_key, dtype=dtype),
            stack(layer, cfg.depth, key=layers_key),
            cfg.levels,
            cfg.head_dim,
            cfg.rope_theta,
        )

    def __call__(
        self,
        tokens: Tokens,
        length: Int[Array, ""],
        *,
        dtype: DTypeLike | None = None,
        remat: bool = False,
    ) -> Float[Array, "tokens features"]:
        """Returns the states of each token at the taps, one tap's features after another's.

        The states of the padding are those of a token that looks at all of the prompt.

        **Arguments:**

        - `tokens`: the ids, padded on the right to any length.
        - `length`: how many of them are not padding, at least 1.
        - `dtype`: the dtype of the activations, by default the dtype of the token embeddings.
        - `remat`: recompute each layer in the backward pass.
        """
        x = self.embed_tokens(tokens)
        x = x if dtype is None else x.astype(dtype)
        count = tokens.shape[0]
        pe = rope(
            jnp.arange(count, dtype=jnp.float32)[:, None], [self.head_dim], theta=self.rope_theta
        )

        # Each layer writes to the slot of the next tap, where the last one to write stays.
        order = sorted(self.levels)
        slots = jnp.asarray(np.searchsorted(order, np.arange(max(order)), side="right"))

        def apply(layer, carry):
            x, seen, index = carry
            x = layer(x, pe, length)
            return x, seen.at[slots[index]].set(x), index + 1

        seen = jnp.zeros((len(order), *x.shape), x.dtype)
        (_, seen, _), _ = fold(self.layers, (x, seen, jnp.asarray(0)), apply, remat=remat)
        return jnp.concatenate([seen[order.index(level)] for level in self.levels], axis=-1)
