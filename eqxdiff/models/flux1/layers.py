"""The parts of the FLUX.1 transformer's blocks.

Source: https://github.com/black-forest-labs/flux/blob/802fb47/src/flux/modules/layers.py, with the
names and the split projections of `FluxTransformer2DModel` of diffusers.
"""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar, Self, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float

from ..._dtypes import at_least_float32
from ..._types import PRNGKey, Scalar
from ...kernels import attention
from ...nn import (
    AbstractLinear,
    AbstractRotary,
    EmbeddingMLP,
    Linear,
    Order,
    RMSNorm,
    apply_rope,
    layer_norm,
    settle,
    silu,
    sinusoid,
)
from ...sharding import join_streams, split_streams, ways
from .config import TransformerConfig


EPS = 1e-6
SINUSOID_DIM = 256

Heads = Float[Array, "tokens heads head_dim"]
Blocks = TypeVar("Blocks", bound=eqx.Module)


class AbstractModulation(eqx.Module):
    """Gives shifts, scales and gates."""

    @abc.abstractmethod
    def __call__(self, vec: Float[Array, " dim"] | None) -> Float[Array, "count dim"]:
        """Returns them for a conditioning vector, which those that are given already ignore."""


class Modulation(AbstractModulation):
    """Shifts, scales and gates from the conditioning vector (https://arxiv.org/abs/2212.09748)."""

    linear: AbstractLinear

    @classmethod
    def init(cls, dim: int, count: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        return cls(Linear.init(dim, count * dim, key=key, dtype=dtype))

    def __call__(self, vec: Float[Array, " dim"] | None) -> Float[Array, "count dim"]:
        assert vec is not None
        return self.linear(silu(vec)).reshape(-1, vec.shape[0])


class Given(AbstractModulation):
    """Shifts, scales and gates that were computed ahead, in the place of a `Modulation`."""

    values: Float[Array, "*layers count dim"]

    def __call__(self, vec: Float[Array, " dim"] | None) -> Float[Array, "count dim"]:
        return self.values


def modulate_ahead(
    blocks: Blocks, names: Sequence[str], vec: Float[Array, " dim"] | None
) -> Blocks:
    """Computes the modulations `names` of all stacked blocks, and puts them in their places.

    Where `fsdp` splits the weights, this is one small sum for all blocks, and not one within each.
    Elsewhere the blocks stay as they are.
    """
    if vec is None or ways("fsdp") == 1:
        return blocks
    where = lambda blocks: tuple(getattr(blocks, name) for name in names)
    given = eqx.filter_vmap(lambda norm: Given(norm(vec)))
    return eqx.tree_at(where, blocks, tuple(map(given, where(blocks))))


def modulate(
    x: Float[Array, "tokens dim"], shift: Float[Array, " dim"], scale: Float[Array, " dim"]
) -> Float[Array, "tokens dim"]:
    """Computes `(1 + scale) * norm(x) + shift` and rounds once."""
    return settle(layer_norm(x, 1 + scale.astype(at_least_float32(scale.dtype)), shift, eps=EPS))


def split_heads(
    x: Float[Array, "tokens dim"],
    q: AbstractLinear,
    k: AbstractLinear,
    v: AbstractLinear,
    norm_q: Callable[[Array], Array],
    norm_k: Callable[[Array], Array],
    count: int,
) -> tuple[Heads, Heads, Heads]:
    """Projects to `count` heads: queries and keys, each head normalised, and values."""
    heads = [f(x).reshape(x.shape[0], count, -1) for f in (q, k, v)]
    return norm_q(heads[0]), norm_k(heads[1]), heads[2]


def attend(
    q: Heads,
    k: Heads,
    v: Heads,
    pe: Float[Array, "tokens 2 half"],
    order: Order,
    bounded: bool,
) -> Float[Array, "tokens dim"]:
    """Turns queries and keys by their positions, attends, and joins the heads."""
    q, k = apply_rope(q, pe, order), apply_rope(k, pe, order)
    return attention(q, k, v, bounded=bounded).reshape(q.shape[0], -1)


class JointAttention(AbstractRotary):
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
    order: Order = eqx.field(static=True, default="pairs")
    bounded: bool = eqx.field(static=True, default=False)

    queries: ClassVar[tuple[str, ...]] = ("to_q", "add_q_proj")
    query_norms: ClassVar[tuple[str, ...]] = ("norm_q", "norm_added_q")
    keys: ClassVar[tuple[str, ...]] = ("to_k", "add_k_proj")
    key_norms: ClassVar[tuple[str, ...]] = ("norm_k", "norm_added_k")

    @classmethod
    def init(cls, cfg: TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        linear = lambda key: Linear.init(cfg.dim, cfg.dim, key=key, dtype=dtype)
        norm = lambda: RMSNorm.init(cfg.attention_head_dim, eps=EPS, dtype=dtype)
        q, k, v, out, add_q, add_k, add_v, add_out = map(linear, jax.random.split(key, 8))
        return cls(
            to_q=q,
            to_k=k,
            to_v=v,
            to_out=out,
            norm_q=norm(),
            norm_k=norm(),
            add_q_proj=add_q,
            add_k_proj=add_k,
            add_v_proj=add_v,
            to_add_out=add_out,
            norm_added_q=norm(),
            norm_added_k=norm(),
            heads=cfg.num_attention_heads,
        )

    def __call__(
        self,
        img: Float[Array, "pixels dim"],
        txt: Float[Array, "tokens dim"],
        pe: Float[Array, "tokens+pixels 2 half"],
    ) -> tuple[Float[Array, "pixels dim"], Float[Array, "tokens dim"]]:
        to_qkv, norms = (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k)
        img_qkv = split_heads(img, *to_qkv, *norms, self.heads)
        to_qkv = self.add_q_proj, self.add_k_proj, self.add_v_proj
        txt_qkv = split_heads(txt, *to_qkv, self.norm_added_q, self.norm_added_k, self.heads)
        q, k, v = (join_streams(*pair) for pair in zip(txt_qkv, img_qkv, strict=True))
        out = attend(q, k, v, pe, self.order, self.bounded)
        txt, img = split_streams(out, txt.shape[0])
        return self.to_out(img), self.to_add_out(txt)


class SelfAttention(AbstractRotary):
    """Attention of the joined streams. The block's `proj_out` projects its output."""

    to_q: AbstractLinear
    to_k: AbstractLinear
    to_v: AbstractLinear
    norm_q: RMSNorm
    norm_k: RMSNorm
    heads: int = eqx.field(static=True)
    order: Order = eqx.field(static=True, default="pairs")
    bounded: bool = eqx.field(static=True, default=False)

    queries: ClassVar[tuple[str, ...]] = ("to_q",)
    query_norms: ClassVar[tuple[str, ...]] = ("norm_q",)
    keys: ClassVar[tuple[str, ...]] = ("to_k",)
    key_norms: ClassVar[tuple[str, ...]] = ("norm_k",)

    @classmethod
    def init(cls, cfg: TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        linear = lambda key: Linear.init(cfg.dim, cfg.dim, key=key, dtype=dtype)
        norm = lambda: RMSNorm.init(cfg.attention_head_dim, eps=EPS, dtype=dtype)
        q, k, v = map(linear, jax.random.split(key, 3))
        heads = cfg.num_attention_heads
        return cls(to_q=q, to_k=k, to_v=v, norm_q=norm(), norm_k=norm(), heads=heads)

    def __call__(
        self, x: Float[Array, "tokens dim"], pe: Float[Array, "tokens 2 half"]
    ) -> Float[Array, "tokens dim"]:
        to_qkv = self.to_q, self.to_k, self.to_v
        qkv = split_heads(x, *to_qkv, self.norm_q, self.norm_k, self.heads)
        return attend(*qkv, pe, self.order, self.bounded)


class TimeTextEmbedding(eqx.Module):
    """The conditioning vector of timestep, guidance and pooled text."""

    timestep_embedder: EmbeddingMLP
    guidance_embedder: EmbeddingMLP | None
    text_embedder: EmbeddingMLP

    @classmethod
    def init(cls, cfg: TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        mlp = lambda width, key: EmbeddingMLP.init(width, cfg.dim, key=key, dtype=dtype)
        keys = jax.random.split(key, 3)
        guidance = mlp(SINUSOID_DIM, keys[1]) if cfg.guidance_embeds else None
        return cls(mlp(SINUSOID_DIM, keys[0]), guidance, mlp(cfg.pooled_projection_dim, keys[2]))

    def __call__(
        self, timestep: Scalar, guidance: Scalar | None, pooled: Float[Array, " pooled_dim"]
    ) -> Float[Array, " dim"]:
        """**Raises:** `ValueError` where guidance is embedded and `guidance` is `None`."""
        embed = lambda t: sinusoid(t, SINUSOID_DIM, flip_sin_to_cos=True, freq_shift=0)
        vec = self.timestep_embedder(embed(timestep).astype(pooled.dtype))
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("This transformer embeds guidance, and `guidance` is missing.")
            vec = vec + self.guidance_embedder(embed(1000 * guidance).astype(pooled.dtype))
        return vec + self.text_embedder(pooled)
