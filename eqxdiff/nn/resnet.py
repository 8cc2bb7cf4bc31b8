from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._types import PRNGKey
from .conv import AbstractConv2d, Conv2d
from .embedding import silu
from .linear import AbstractLinear, Linear
from .norm import GroupNorm


class ResnetBlock2D(eqx.Module):
    """Two 3x3 convolutions and a skip, of one channels-last image.

    An embedded timestep may shift the image between the convolutions.

    Source: https://arxiv.org/abs/2006.11239, appendix B, and `ResnetBlock2D` of diffusers.
    """

    norm1: GroupNorm
    conv1: AbstractConv2d
    time_emb_proj: AbstractLinear | None
    norm2: GroupNorm
    conv2: AbstractConv2d
    conv_shortcut: AbstractConv2d | None

    @classmethod
    def init(
        cls,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None = None,
        groups: int,
        eps: float,
        key: PRNGKey,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Makes a random block, with a 1x1 convolution on the skip where the channels change.

        `temb_channels` is the length of the embedded timestep, or `None` for a block without one.
        """
        keys = jax.random.split(key, 4)
        shortcut = time_emb_proj = None
        if temb_channels is not None:
            time_emb_proj = Linear.init(temb_channels, out_channels, key=keys[2], dtype=dtype)
        if in_channels != out_channels:
            shortcut = Conv2d.init(in_channels, out_channels, 1, key=keys[3], dtype=dtype)
        return cls(
            GroupNorm.init(in_channels, groups=groups, eps=eps, dtype=dtype),
            Conv2d.init(in_channels, out_channels, 3, padding=1, key=keys[0], dtype=dtype),
            time_emb_proj,
            GroupNorm.init(out_channels, groups=groups, eps=eps, dtype=dtype),
            Conv2d.init(out_channels, out_channels, 3, padding=1, key=keys[1], dtype=dtype),
            shortcut,
        )

    def __call__(
        self, x: Float[Array, "h w in"], temb: Float[Array, " temb"] | None = None
    ) -> Float[Array, "h w out"]:
        """**Raises:** `ValueError` where `temb` is missing, or the block has no use for it."""
        y = self.conv1(silu(self.norm1(x)))
        if (temb is None) != (self.time_emb_proj is None):
            raise ValueError("A block takes `temb` if and only if it has a `time_emb_proj`.")
        if temb is not None and self.time_emb_proj is not None:
            y = y + self.time_emb_proj(silu(temb))
        y = self.conv2(silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(eqx.Module):
    """Halves height and width by a 3x3 convolution of stride 2."""

    conv: AbstractConv2d

    @classmethod
    def init(
        cls,
        channels: int,
        *,
        padding: int | tuple[tuple[int, int], tuple[int, int]],
        key: PRNGKey,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Makes a random downsampler; `padding` is that of `Conv2d.init`.

        The UNets pad by 1, the autoencoders by one row and one column after the image.
        """
        return cls(
            Conv2d.init(channels, channels, 3, stride=2, padding=padding, key=key, dtype=dtype)
        )

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
        return self.conv(x)


class Upsample2D(eqx.Module):
    """Doubles height and width by repeating pixels, then a 3x3 convolution."""

    conv: AbstractConv2d

    @classmethod
    def init(cls, channels: int, *, key: PRNGKey, dtype: DTypeLike = jnp.float32) -> Self:
        return cls(Conv2d.init(channels, channels, 3, padding=1, key=key, dtype=dtype))

    def __call__(
        self, x: Float[Array, "h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "h2 w2 c"]:
        """Doubles `x`, and cuts the result to `size`, a height and width, where it is given.

        A side that was odd before it was halved loses the last row or column.
        """
        h, w, c = x.shape
        x = jnp.broadcast_to(x[:, None, :, None, :], (h, 2, w, 2, c)).reshape(2 * h, 2 * w, c)
        if size is not None:
            x = x[: size[0], : size[1]]
        return self.conv(x)
