"""The residual blocks, attention and levels of the autoencoder."""

from typing import Self

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float

from .._types import PRNGKey
from ..kernels import attention
from ..nn import AbstractLinear, Downsample2D, GroupNorm, Linear, ResnetBlock2D, Upsample2D
from .config import AutoencoderKLConfig


EPS = 1e-6
DOWNSAMPLE_PADDING = (0, 1), (0, 1)


def _resnet(
    cfg: AutoencoderKLConfig, in_channels: int, out_channels: int, key: PRNGKey, dtype: DTypeLike
) -> ResnetBlock2D:
    groups = cfg.norm_num_groups
    return ResnetBlock2D.init(
        in_channels, out_channels, groups=groups, eps=EPS, key=key, dtype=dtype
    )


def _resnets(
    cfg: AutoencoderKLConfig,
    in_channels: int,
    out_channels: int,
    depth: int,
    key: PRNGKey,
    dtype: DTypeLike,
) -> tuple[ResnetBlock2D, ...]:
    widths = [in_channels] + [out_channels] * (depth - 1)
    keys = jax.random.split(key, depth)
    return tuple(_resnet(cfg, w, out_channels, k, dtype) for w, k in zip(widths, keys, strict=True))


class SpatialAttention(eqx.Module):
    """Attention of one head among all pixels, with a skip."""

    group_norm: GroupNorm
    to_q: AbstractLinear
    to_k: AbstractLinear
    to_v: AbstractLinear
    to_out: AbstractLinear

    @classmethod
    def init(cls, cfg: AutoencoderKLConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        dim = cfg.block_out_channels[-1]
        linears = (Linear.init(dim, dim, key=k, dtype=dtype) for k in jax.random.split(key, 4))
        return cls(GroupNorm.init(dim, groups=cfg.norm_num_groups, eps=EPS, dtype=dtype), *linears)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        y = self.group_norm(x).reshape(-1, 1, x.shape[-1])
        y = attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out(y).reshape(x.shape)


class MiddleLevel(eqx.Module):
    """The coarsest level: a residual block, attention, and a residual block."""

    attentions: tuple[SpatialAttention, ...]
    resnets: tuple[ResnetBlock2D, ...]

    @classmethod
    def init(cls, cfg: AutoencoderKLConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        key1, key2 = jax.random.split(key)
        attentions = ()
        if cfg.mid_block_add_attention:
            attentions = (SpatialAttention.init(cfg, key=key1, dtype=dtype),)
        channels = cfg.block_out_channels[-1]
        return cls(attentions, _resnets(cfg, channels, channels, 2, key2, dtype))

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        x = self.resnets[0](x)
        for attend in self.attentions:
            x = attend(x)
        return self.resnets[1](x)


class EncoderLevel(eqx.Module):
    """One level of the encoder; each but the last ends in a downsampler."""

    resnets: tuple[ResnetBlock2D, ...]
    downsamplers: tuple[Downsample2D, ...]

    @classmethod
    def init(cls, cfg: AutoencoderKLConfig, level: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        """Makes a random level; `level` counts from the image."""
        key1, key2 = jax.random.split(key)
        widths = cfg.block_out_channels
        channels, downsamplers = widths[level], ()
        if level < len(widths) - 1:
            padding = DOWNSAMPLE_PADDING
            downsamplers = (Downsample2D.init(channels, padding=padding, key=key2, dtype=dtype),)
        before = widths[max(level - 1, 0)]
        return cls(_resnets(cfg, before, channels, cfg.layers_per_block, key1, dtype), downsamplers)

    @property
    def layers(self) -> tuple[ResnetBlock2D | Downsample2D, ...]:
        return (*self.resnets, *self.downsamplers)

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        for layer in self.layers:
            x = layer(x)
        return x


class DecoderLevel(eqx.Module):
    """One level of the decoder; each but the last ends in an upsampler."""

    resnets: tuple[ResnetBlock2D, ...]
    upsamplers: tuple[Upsample2D, ...]

    @classmethod
    def init(cls, cfg: AutoencoderKLConfig, level: int, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        """Makes a random level; `level` counts from the latent."""
        key1, key2 = jax.random.split(key)
        widths = cfg.block_out_channels[::-1]
        channels, upsamplers = widths[level], ()
        if level < len(widths) - 1:
            upsamplers = (Upsample2D.init(channels, key=key2, dtype=dtype),)
        before, depth = widths[max(level - 1, 0)], cfg.layers_per_block + 1
        return cls(_resnets(cfg, before, channels, depth, key1, dtype), upsamplers)

    @property
    def layers(self) -> tuple[ResnetBlock2D | Upsample2D, ...]:
        return (*self.resnets, *self.upsamplers)

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        for layer in self.layers:
            x = layer(x)
        return x
