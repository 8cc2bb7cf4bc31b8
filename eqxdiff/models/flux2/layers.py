"""The parts of the FLUX.2 transformer's blocks.

Source: https://github.com/black-forest-labs/flux2/blob/main/src/flux2/model.py, with the names and
the projections of `Flux2Transformer2DModel` of diffusers.
"""

from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._dtypes import at_least_float32
from ..._types import PRNGKey, Scalar
from ...kernels import attention
from ...nn import (
    AbstractLinear,
    EmbeddingMLP,
    Linear,
    RMSNorm,
    apply_rope,
    layer_norm,
    silu,
    sinusoid,
)
from .config import Flux2TransformerConfig


Tokens = Float[Array, "tokens dim"]
Heads = Float[Array, "tokens heads head_dim"]
Angles = Float[Array, "tokens 2 half"]
Parameters = Float[Array, "3 dim"]
"""Shift, scale and gate of a part of a block."""


class SharedModulation(eqx.Module):
    """Shifts, scales and gates for all blocks of a kind (https://arxiv.org/abs/2212.09748)."""

    linear: AbstractLinear

    @classmethod
    def init(cls, dim: int, count: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        return cls(Linear.init(dim, count * dim, bias=False, key=key, dtype=dtype))

    def __call__(self, vec: Float[Array, " dim"]) -> Float[Array, "count dim"]:
        return self.linear(silu(vec)).reshape(-1, vec.shape[0])


def modulate_by(
    x: Tokens, shift: Float[Array, " dim"], scale: Float[Array, " dim"], eps: float
) -> Tokens:
    """Computes `(1 + scale) * norm(x) + shift` and rounds once."""
    return layer_norm(x, 1 + scale.astype(at_least_float32(scale.dtype)), shift, eps=eps)


def swiglu(x: Float[Array, "*tokens both"]) -> Float[Array, "*tokens half"]:
    """Computes `silu(first half) * second half` (https://arxiv.org/abs/2002.05202)."""
    gate, up = jnp.split(x, 2, axis=-1)
    return silu(gate) * up


def attend(q: Heads, k: Heads, v: Heads, pe: Angles) -> Tokens:
    """Turns queries and keys by their positions, attends, and joins the heads."""
    return attention(apply_rope(q, pe), apply_rope(k, pe), v).reshape(q.shape[0], -1)


class Flux2MLP(eqx.Module):
    """Linear, gate, linear."""

    linear_in: AbstractLinear
    linear_out: AbstractLinear

    @classmethod
    def init(cls, cfg: Flux2TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        key1, key2 = jax.random.split(key)
        return cls(
            Linear.init(cfg.dim, 2 * cfg.hidden, bias=False, key=key1, dtype=dtype),
            Linear.init(cfg.hidden, cfg.dim, bias=False, key=key2, dtype=dtype),
        )

    def __call__(self, x: Tokens) -> Tokens:
        return self.linear_out(swiglu(self.linear_in(x)))


class Flux2JointAttention(eqx.Module):
    """Attention over text and image together. Each of the two has its own projections."""

    to_q: AbstractLinear
    to_k: AbstractLinear
    to_v: AbstractLinear
    to_out: AbstractLinear
    norm_q: RMSNorm
    norm_k: RMSNorm
    add_q_proj: AbstractLinear
    add_k_proj: AbstractLinear
    add_v_proj: AbstractLinear
    to_add_out: AbstractLinear
    norm_added_q: RMSNorm
    norm_added_k: RMSNorm
    heads: int = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: Flux2TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        linear = lambda key: Linear.init(cfg.dim, cfg.dim, bias=False, key=key, dtype=dtype)
        norm = lambda: RMSNorm.init(cfg.attention_head_dim, eps=cfg.eps, dtype=dtype)
        q, k, v, out, add_q, add_k, add_v, add_out = map(linear, jax.random.split(key, 8))
        img, txt = (q, k, v, out, norm(), norm()), (add_q, add_k, add_v, add_out, norm(), norm())
        return cls(*img, *txt, cfg.num_attention_heads)

    def __call__(
        self,
        img: Float[Array, "pixels dim"],
        txt: Float[Array, "tokens dim"],
        pe: Float[Array, "tokens+pixels 2 half"],
    ) -> tuple[Float[Array, "pixels dim"], Float[Array, "tokens dim"]]:
        split = lambda x: x.reshape(x.shape[0], self.heads, -1)
        img_q, img_k = self.norm_q(split(self.to_q(img))), self.norm_k(split(self.to_k(img)))
        txt_q = self.norm_added_q(split(self.add_q_proj(txt)))
        txt_k = self.norm_added_k(split(self.add_k_proj(txt)))
        q, k = jnp.concatenate([txt_q, img_q]), jnp.concatenate([txt_k, img_k])
        v = jnp.concatenate([split(self.add_v_proj(txt)), split(self.to_v(img))])
        txt, img = jnp.split(attend(q, k, v, pe), [txt.shape[0]])
        return self.to_out(img), self.to_add_out(txt)


class ParallelAttention(eqx.Module):
    """Attention and MLP side by side, with one projection before and one after both
    (https://arxiv.org/abs/2302.05442)."""

    to_qkv_mlp_proj: AbstractLinear
    to_out: AbstractLinear
    norm_q: RMSNorm
    norm_k: RMSNorm
    heads: int = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: Flux2TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        key1, key2 = jax.random.split(key)
        norm = lambda: RMSNorm.init(cfg.attention_head_dim, eps=cfg.eps, dtype=dtype)
        linear = lambda i, o, key: Linear.init(i, o, bias=False, key=key, dtype=dtype)
        inner = 3 * cfg.dim + 2 * cfg.hidden
        first, last = linear(cfg.dim, inner, key1), linear(cfg.dim + cfg.hidden, cfg.dim, key2)
        return cls(first, last, norm(), norm(), cfg.num_attention_heads)

    def __call__(self, x: Tokens, pe: Angles) -> Tokens:
        dim = x.shape[1]
        *qkv, mlp = jnp.split(self.to_qkv_mlp_proj(x), [dim, 2 * dim, 3 * dim], axis=-1)
        q, k, v = (each.reshape(x.shape[0], self.heads, -1) for each in qkv)
        attended = attend(self.norm_q(q), self.norm_k(k), v, pe)
        return self.to_out(jnp.concatenate([attended, swiglu(mlp)], axis=-1))


class TimeGuidanceEmbedding(eqx.Module):
    """The conditioning vector of timestep and embedded guidance."""

    timestep_embedder: EmbeddingMLP
    guidance_embedder: EmbeddingMLP | None
    channels: int = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: Flux2TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        channels = cfg.timestep_guidance_channels
        mlp = lambda key: EmbeddingMLP.init(channels, cfg.dim, bias=False, key=key, dtype=dtype)
        key1, key2 = jax.random.split(key)
        return cls(mlp(key1), mlp(key2) if cfg.guidance_embeds else None, channels)

    def __call__(
        self, timestep: Scalar, guidance: Scalar | None, dtype: DTypeLike
    ) -> Float[Array, " dim"]:
        """**Raises:** `ValueError` where guidance is embedded and `guidance` is `None`."""
        embed = lambda t: sinusoid(t, self.channels, flip_sin_to_cos=True, freq_shift=0)
        vec = self.timestep_embedder(embed(timestep).astype(dtype))
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("This transformer embeds guidance, and `guidance` is missing.")
            vec = vec + self.guidance_embedder(embed(1000 * guidance).astype(dtype))
        return vec
