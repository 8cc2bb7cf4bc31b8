"""The encoder of T5 version 1.1 (https://arxiv.org/abs/1910.10683, https://arxiv.org/abs/2002.05202).

Source: `T5EncoderModel` of transformers,
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/t5/modeling_t5.py
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PyTree

from .._config import parse_config
from .._types import PRNGKey, Tokens
from ..kernels import attention
from ..nn import (
    AbstractLinear,
    Embedding,
    Keep,
    Linear,
    RMSNorm,
    everything,
    fold,
    gelu_tanh,
    nothing,
    stack,
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The sizes of a T5 encoder, named as in `text_encoder_2/config.json`."""

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        buckets = self.relative_attention_num_buckets
        if buckets < 4 or buckets % 4:
            raise ValueError(
                f"relative_attention_num_buckets: {buckets} is not a positive multiple of 4"
            )
        if self.relative_attention_max_distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance: {self.relative_attention_max_distance} is not "
                f"more than a quarter of relative_attention_num_buckets {buckets}"
            )

    @classmethod
    def parse(cls, fields: Mapping[str, Any], *, name: str = "text_encoder_2/config.json") -> Self:
        """Reads a `config.json`, which the errors call `name`. **Raises:** `ConfigError`."""
        if "feed_forward_proj" not in fields:  # a config without it means the first version's ReLU
            fields = {**fields, "feed_forward_proj": "relu"}
        return parse_config(
            cls,
            fields,
            name=name,
            supported={
                "model_type": ("t5",),
                "feed_forward_proj": ("gated-gelu",),
                "dense_act_fn": ("gelu_new",),
                "is_gated_act": (True,),
                "is_decoder": (False,),
            },
            ignored=(
                *("architectures", "classifier_dropout", "dropout_rate", "initializer_factor"),
                *("decoder_start_token_id", "eos_token_id", "pad_token_id", "bos_token_id"),
                *("is_encoder_decoder", "num_decoder_layers", "scale_decoder_outputs"),
                *("tie_word_embeddings", "use_cache", "output_past", "n_positions"),
                *("torch_dtype", "dtype", "transformers_version", "task_specific_params"),
                *("output_attentions", "output_hidden_states", "return_dict"),
            ),
        )


class T5Attention(eqx.Module):
    """Multi-head self-attention without scale or biases; a bias of the scores tells positions."""

    q: AbstractLinear
    k: AbstractLinear
    v: AbstractLinear
    o: AbstractLinear

    @classmethod
    def init(cls, dim: int, inner: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        *keys, out_key = jax.random.split(key, 4)
        q, k, v = (Linear.init(dim, inner, bias=False, key=k, dtype=dtype) for k in keys)
        return cls(q, k, v, Linear.init(inner, dim, bias=False, key=out_key, dtype=dtype))

    def __call__(
        self, x: Float[Array, "tokens dim"], bias: Float[Array, "heads tokens tokens"]
    ) -> Float[Array, "tokens dim"]:
        tokens, heads = x.shape[0], bias.shape[0]
        q, k, v = (proj(x).reshape(tokens, heads, -1) for proj in (self.q, self.k, self.v))
        return self.o(attention(q, k, v, bias=bias, scale=1.0).reshape(tokens, -1))


class T5GatedMLP(eqx.Module):
    """Computes `wo(gelu(wi_0 x) * wi_1 x)`."""

    wi_0: AbstractLinear
    wi_1: AbstractLinear
    wo: AbstractLinear

    @classmethod
    def init(cls, dim: int, hidden: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        key0, key1, out_key = jax.random.split(key, 3)
        return cls(
            Linear.init(dim, hidden, bias=False, key=key0, dtype=dtype),
            Linear.init(dim, hidden, bias=False, key=key1, dtype=dtype),
            Linear.init(hidden, dim, bias=False, key=out_key, dtype=dtype),
        )

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        return self.wo(gelu_tanh(self.wi_0(x)) * self.wi_1(x))


class T5Block(eqx.Module):
    """A pre-norm transformer block."""

    attention_norm: RMSNorm
    attention: T5Attention
    mlp_norm: RMSNorm
    mlp: T5GatedMLP

    @classmethod
    def init(cls, cfg: T5Config, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        attention_key, mlp_key = jax.random.split(key)
        dim, inner = cfg.d_model, cfg.num_heads * cfg.d_kv
        return cls(
            RMSNorm.init(dim, eps=cfg.layer_norm_epsilon, dtype=dtype),
            T5Attention.init(dim, inner, key=attention_key, dtype=dtype),
            RMSNorm.init(dim, eps=cfg.layer_norm_epsilon, dtype=dtype),
            T5GatedMLP.init(dim, cfg.d_ff, key=mlp_key, dtype=dtype),
        )

    def __call__(
        self, x: Float[Array, "tokens dim"], bias: Float[Array, "heads tokens tokens"]
    ) -> Float[Array, "tokens dim"]:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(eqx.Module):
    """Embedding, blocks, norm. All blocks share the bias of the relative positions."""

    shared: Embedding
    relative_attention_bias: Embedding
    block: T5Block
    final_layer_norm: RMSNorm
    buckets: int = eqx.field(static=True)
    max_distance: int = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: T5Config, *, key: PRNGKey, dtype: DTypeLike = jnp.float32) -> Self:
        """Makes a random encoder with weights of `dtype`."""
        shared_key, bias_key, block_key = jax.random.split(key, 3)
        buckets = cfg.relative_attention_num_buckets
        block = lambda key: T5Block.init(cfg, key=key, dtype=dtype)
        return cls(
            Embedding.init(cfg.vocab_size, cfg.d_model, key=shared_key, dtype=dtype),
            Embedding.init(buckets, cfg.num_heads, key=bias_key, dtype=dtype),
            stack(block, cfg.num_layers, key=block_key),
            RMSNorm.init(cfg.d_model, eps=cfg.layer_norm_epsilon, dtype=dtype),
            buckets,
            cfg.relative_attention_max_distance,
        )

    def __call__(
        self, tokens: Tokens, *, dtype: DTypeLike | None = None, remat: bool = False
    ) -> Float[Array, "tokens dim"]:
        """Returns the final state of each token of one prompt.

        There is no mask: the padding takes part as the other tokens do.

        **Arguments:**

        - `tokens`: the ids, with end token, padded to any length.
        - `dtype`: the dtype of the activations, by default the dtype of the token embeddings.
        - `remat`: recompute each block in the backward pass.
        """
        return self.capture(tokens, dtype=dtype, remat=remat, keep=nothing)[0]

    def capture(
        self,
        tokens: Tokens,
        *,
        dtype: DTypeLike | None = None,
        remat: bool = False,
        keep: Keep = everything,
    ) -> tuple[Float[Array, "tokens dim"], PyTree]:
        """Does what `__call__` does, and also returns `keep(x)` after every block, stacked.

        `keep` is that of `nn.fold`: by default the whole output of the block.
        """
        x = self.shared(tokens)
        x = x if dtype is None else x.astype(dtype)
        buckets = relative_buckets(tokens.shape[0], self.buckets, self.max_distance)
        bias = self.relative_attention_bias(jnp.asarray(buckets)).transpose(2, 0, 1)
        apply = lambda block, x: block(x, bias)
        x, seen = fold(self.block, x, apply, remat=remat, keep=keep)
        return self.final_layer_norm(x), seen


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each pair of positions, `(query, key)`, in a bidirectional encoder.

    The first half of the buckets is for keys at or before the query, the second for later keys. In
    each half, half of the buckets hold one distance each. The others hold ranges of distances that
    grow by a constant factor up to `max_distance`; all larger distances share the last bucket.

    Source: https://arxiv.org/abs/1910.10683, section 2.1. The boundaries are exact: integers alone
    decide where the reference compares rounded logarithms.
    """
    half = num_buckets // 2
    exact = half // 2
    steps = half - exact
    # Distance d is in step k or beyond where (d / exact) ** steps >= (max_distance / exact) ** k.
    edges = [
        next(d for d in range(exact, max_distance + 1) if d**steps * exact**k >= bound)
        for k in range(1, steps)
        for bound in [max_distance**k * exact**steps]
    ]
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    size = np.abs(distance)
    far = exact + np.searchsorted(np.asarray(edges), size, side="right")
    return (np.where(size < exact, size, far) + half * (distance > 0)).astype(np.int32)
