"""The layers of the UNet of Stable Diffusion 1, 2 and XL, under the names of diffusers."""

from itertools import zip_longest
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._types import PRNGKey
from ...kernels import attention
from ...nn import (
    AbstractConv2d,
    AbstractLinear,
    Conv2d,
    Downsample2D,
    GroupNorm,
    LayerNorm,
    Linear,
    ResnetBlock2D,
    Upsample2D,
    each,
    fold,
    gelu_erf,
    stack,
)
from .config import UNetConfig


LAYER_NORM_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6
MLP_RATIO = 4


class Keys(eqx.Module):
    """What attention to a prompt computes of the prompt, in a stack of blocks of each."""

    k: Float[Array, "*layers tokens heads dim"]
    v: Float[Array, "*layers tokens heads dim"]


Context = Float[Array, "tokens context_dim"] | Keys
"""A prompt's hidden states, or their keys and values for these weights."""

LevelContext = Float[Array, "tokens context_dim"] | tuple[Keys, ...]
"""The same for the transformers of a level."""


class Attention(eqx.Module):
    """Attention of pixels to each other, or to the prompt."""

    to_q: AbstractLinear
    to_k: AbstractLinear
    to_v: AbstractLinear
    to_out: AbstractLinear
    heads: int = eqx.field(static=True)

    @classmethod
    def init(
        cls, dim: int, context_dim: int, heads: int, *, key: PRNGKey, dtype: DTypeLike
    ) -> Self:
        keys = jax.random.split(key, 4)
        widths = (dim, context_dim, context_dim)
        q, k, v = (
            Linear.init(width, dim, bias=False, key=key, dtype=dtype)
            for width, key in zip(widths, keys[:3], strict=True)
        )
        return cls(q, k, v, Linear.init(dim, dim, key=keys[3], dtype=dtype), heads)

    def keys(self, context: Float[Array, "tokens context_dim"]) -> Keys:
        """Returns the keys and values of what is attended to."""
        k, v = self.to_k(context), self.to_v(context)
        return Keys(*(y.reshape(y.shape[0], self.heads, -1) for y in (k, v)))

    def __call__(
        self, x: Float[Array, "pixels dim"], context: Context
    ) -> Float[Array, "pixels dim"]:
        keys = context if isinstance(context, Keys) else self.keys(context)
        q = self.to_q(x).reshape(x.shape[0], self.heads, -1)
        return self.to_out(attention(q, keys.k, keys.v).reshape(x.shape))


class GatedMLP(eqx.Module):
    """Multiplies one linear map of `x` by the GELU of another, and projects the product
    (https://arxiv.org/abs/2002.05202). `proj_in` holds the first two maps."""

    proj_in: AbstractLinear
    proj_out: AbstractLinear

    @classmethod
    def init(cls, dim: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        key1, key2 = jax.random.split(key)
        hidden = MLP_RATIO * dim
        return cls(
            Linear.init(dim, 2 * hidden, key=key1, dtype=dtype),
            Linear.init(hidden, dim, key=key2, dtype=dtype),
        )

    def __call__(self, x: Float[Array, "pixels dim"]) -> Float[Array, "pixels dim"]:
        x, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(x * gelu_erf(gate))


class TransformerBlock(eqx.Module):
    """Attention to the image, attention to the prompt, and a gated MLP."""

    norm1: LayerNorm
    attn1: Attention
    norm2: LayerNorm
    attn2: Attention
    norm3: LayerNorm
    ff: GatedMLP

    @classmethod
    def init(cls, cfg: UNetConfig, level: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys = jax.random.split(key, 3)
        dim, heads = cfg.block_out_channels[level], cfg.heads(level)
        norm = lambda: LayerNorm.init(dim, eps=LAYER_NORM_EPS, dtype=dtype)
        return cls(
            norm(),
            Attention.init(dim, dim, heads, key=keys[0], dtype=dtype),
            norm(),
            Attention.init(dim, cfg.cross_attention_dim, heads, key=keys[1], dtype=dtype),
            norm(),
            GatedMLP.init(dim, key=keys[2], dtype=dtype),
        )

    def __call__(
        self, x: Float[Array, "pixels dim"], context: Context
    ) -> Float[Array, "pixels dim"]:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class _Prompted(eqx.Module):
    """Stacked blocks, each with its keys of the prompt."""

    block: TransformerBlock
    keys: Keys


class SpatialTransformer(eqx.Module):
    """Stacked transformer blocks on the pixels of an image, with a skip around them all."""

    norm: GroupNorm
    proj_in: AbstractLinear | AbstractConv2d
    transformer_blocks: TransformerBlock
    proj_out: AbstractLinear | AbstractConv2d

    @classmethod
    def init(cls, cfg: UNetConfig, level: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys = jax.random.split(key, 3)
        dim, groups = cfg.block_out_channels[level], cfg.norm_num_groups
        linear = lambda key: Linear.init(dim, dim, key=key, dtype=dtype)
        conv = lambda key: Conv2d.init(dim, dim, 1, key=key, dtype=dtype)
        project = linear if cfg.use_linear_projection else conv
        block = lambda key: TransformerBlock.init(cfg, level, key=key, dtype=dtype)
        return cls(
            GroupNorm.init(dim, groups=groups, eps=TRANSFORMER_NORM_EPS, dtype=dtype),
            project(keys[0]),
            stack(block, cfg.depth(level), key=keys[1]),
            project(keys[2]),
        )

    def keys(self, context: Float[Array, "tokens context_dim"]) -> Keys:
        """Returns the keys and values of a prompt in each block."""
        return each(self.transformer_blocks, lambda block: block.attn2.keys(context))

    def without_keys(self) -> "SpatialTransformer":
        """Returns the transformer without the weights that `keys` uses."""
        where = lambda t: (t.transformer_blocks.attn2.to_k, t.transformer_blocks.attn2.to_v)
        return eqx.tree_at(where, self, (None, None))

    def __call__(
        self, x: Float[Array, "h w c"], context: Context, remat: bool
    ) -> Float[Array, "h w c"]:
        y = self.proj_in(self.norm(x)).reshape(-1, x.shape[-1])
        blocks = self.transformer_blocks
        if isinstance(context, Keys):
            attend = lambda pair, y: pair.block(y, pair.keys)
            y, _ = fold(_Prompted(blocks, context), y, attend, remat=remat)
        else:
            y, _ = fold(blocks, y, lambda block, y: block(y, context), remat=remat)
        return x + self.proj_out(y.reshape(x.shape))


def _contexts(
    transformers: tuple[SpatialTransformer, ...], context: LevelContext
) -> tuple[Context, ...]:
    """Returns the context of each transformer of a level."""
    return context if isinstance(context, tuple) else (context,) * len(transformers)


def _resnet(cfg: UNetConfig, in_channels: int, out_channels: int, **kwargs) -> ResnetBlock2D:
    temb, groups, eps = cfg.temb_channels, cfg.norm_num_groups, cfg.norm_eps
    return ResnetBlock2D.init(
        in_channels, out_channels, temb_channels=temb, groups=groups, eps=eps, **kwargs
    )


class DownBlock(eqx.Module):
    """A level on the way down: residual blocks, each followed by a transformer or none of them."""

    resnets: tuple[ResnetBlock2D, ...]
    attentions: tuple[SpatialTransformer, ...]
    downsamplers: tuple[Downsample2D, ...]

    @classmethod
    def init(cls, cfg: UNetConfig, level: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys = jax.random.split(key, 2 * cfg.layers_per_block + 1)
        out, before = cfg.block_out_channels[level], cfg.block_out_channels[max(level - 1, 0)]
        widths = [before] + [out] * (cfg.layers_per_block - 1)
        resnets, attentions, downsamplers = [], [], ()
        for width, key1, key2 in zip(widths, keys[1::2], keys[2::2], strict=True):
            resnets.append(_resnet(cfg, width, out, key=key1, dtype=dtype))
            if cfg.attends(level):
                attentions.append(SpatialTransformer.init(cfg, level, key=key2, dtype=dtype))
        if level < cfg.levels - 1:
            downsamplers = (Downsample2D.init(out, padding=1, key=keys[0], dtype=dtype),)
        return cls(tuple(resnets), tuple(attentions), downsamplers)

    def __call__(
        self,
        x: Float[Array, "h w in"],
        temb: Float[Array, " temb"],
        context: LevelContext,
        remat: bool,
    ) -> list[Float[Array, "_ _ out"]]:
        """Returns the output of each layer; the last output is the level's."""
        outputs = []
        contexts = _contexts(self.attentions, context)
        for resnet, attend, of in zip_longest(self.resnets, self.attentions, contexts):
            x = resnet(x, temb)
            x = x if attend is None else attend(x, of, remat)
            outputs.append(x)
        return outputs + [downsample(x) for downsample in self.downsamplers]


class MidBlock(eqx.Module):
    """The lowest level: a residual block, a transformer, a residual block."""

    resnets: tuple[ResnetBlock2D, ResnetBlock2D]
    attentions: tuple[SpatialTransformer]

    @classmethod
    def init(cls, cfg: UNetConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys, level, width = jax.random.split(key, 3), cfg.levels - 1, cfg.block_out_channels[-1]
        first, last = (_resnet(cfg, width, width, key=k, dtype=dtype) for k in keys[:2])
        return cls((first, last), (SpatialTransformer.init(cfg, level, key=keys[2], dtype=dtype),))

    def __call__(
        self,
        x: Float[Array, "h w c"],
        temb: Float[Array, " temb"],
        context: LevelContext,
        remat: bool,
    ) -> Float[Array, "h w c"]:
        (own,) = _contexts(self.attentions, context)
        x = self.attentions[0](self.resnets[0](x, temb), own, remat)
        return self.resnets[1](x, temb)


class UpBlock(eqx.Module):
    """A level on the way up: like `DownBlock`, but each residual block also takes the output of one
    layer on the way down."""

    resnets: tuple[ResnetBlock2D, ...]
    attentions: tuple[SpatialTransformer, ...]
    upsamplers: tuple[Upsample2D, ...]

    @classmethod
    def init(
        cls, cfg: UNetConfig, level: int, skips: list[int], *, key: PRNGKey, dtype: DTypeLike
    ) -> Self:
        """Makes a random level. `level` counts as on the way down; `skips` are the widths of the
        outputs that the level takes, the last first."""
        keys = jax.random.split(key, 2 * len(skips) + 1)
        out, before = cfg.block_out_channels[level], cfg.block_out_channels[level + 1 :][:1]
        widths = [*before, *[out] * len(skips)]
        resnets, attentions, upsamplers = [], [], ()
        for width, skip, key1, key2 in zip(widths, skips, keys[1::2], keys[2::2], strict=False):
            resnets.append(_resnet(cfg, width + skip, out, key=key1, dtype=dtype))
            if cfg.attends(level):
                attentions.append(SpatialTransformer.init(cfg, level, key=key2, dtype=dtype))
        if level > 0:
            upsamplers = (Upsample2D.init(out, key=keys[0], dtype=dtype),)
        return cls(tuple(resnets), tuple(attentions), upsamplers)

    def __call__(
        self,
        x: Float[Array, "h w in"],
        skips: list[Float[Array, "_ _ _"]],
        temb: Float[Array, " temb"],
        context: LevelContext,
        remat: bool,
    ) -> tuple[Float[Array, "_ _ out"], list[Float[Array, "_ _ _"]]]:
        """Returns the output and the remaining skips.

        Each residual block takes one skip from the end. The output has the height and width of the
        last skip that remains.
        """
        own, skips = skips[-len(self.resnets) :], skips[: -len(self.resnets)]
        contexts = _contexts(self.attentions, context)
        for resnet, attend, of in zip_longest(self.resnets, self.attentions, contexts):
            x = resnet(jnp.concatenate([x, own.pop()], axis=-1), temb)
            x = x if attend is None else attend(x, of, remat)
        for upsample in self.upsamplers:
            x = upsample(x, (skips[-1].shape[0], skips[-1].shape[1]))
        return x, skips
