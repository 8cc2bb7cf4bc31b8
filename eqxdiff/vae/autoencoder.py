"""The KL-regularised autoencoder of SD, SDXL, SD3 and FLUX.

Source: https://arxiv.org/abs/2112.10752, section 3.1; the names are those of `AutoencoderKL` of
diffusers.
"""

from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._dtypes import at_least_float32
from .._types import PRNGKey
from ..nn import AbstractConv2d, Conv2d, GroupNorm, silu
from ..sharding import constrain
from .blocks import EPS, DecoderLevel, EncoderLevel, MiddleLevel
from .config import AutoencoderKLConfig


LOGVAR_RANGE = -30.0, 20.0


class Encoder(eqx.Module):
    """An image to the moments of its latent, mean and log-variance side by side."""

    conv_in: AbstractConv2d
    down_blocks: tuple[EncoderLevel, ...]
    mid_block: MiddleLevel
    conv_norm_out: GroupNorm
    conv_out: AbstractConv2d

    @classmethod
    def init(cls, cfg: AutoencoderKLConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        widths, levels = cfg.block_out_channels, len(cfg.block_out_channels)
        keys = jax.random.split(key, levels + 3)
        conv = lambda i, o, key: Conv2d.init(i, o, 3, padding=1, key=key, dtype=dtype)
        return cls(
            conv(cfg.in_channels, widths[0], keys[-1]),
            tuple(EncoderLevel.init(cfg, i, key=keys[i], dtype=dtype) for i in range(levels)),
            MiddleLevel.init(cfg, key=keys[-2], dtype=dtype),
            GroupNorm.init(widths[-1], groups=cfg.norm_num_groups, eps=EPS, dtype=dtype),
            conv(widths[-1], 2 * cfg.latent_channels, keys[-3]),
        )

    def __call__(self, image: Float[Array, "H W channels"]) -> Float[Array, "h w moments"]:
        x = self.conv_in(constrain(image, "rows", None, None))
        for block in self.down_blocks:
            x = constrain(block(x), "rows", None, None)
        return self.finish(x)

    def finish(self, x: Float[Array, "h w c"]) -> Float[Array, "h w moments"]:
        """What follows the last level."""
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(eqx.Module):
    """A latent to an image."""

    conv_in: AbstractConv2d
    mid_block: MiddleLevel
    up_blocks: tuple[DecoderLevel, ...]
    conv_norm_out: GroupNorm
    conv_out: AbstractConv2d

    @classmethod
    def init(cls, cfg: AutoencoderKLConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        widths, levels = cfg.block_out_channels, len(cfg.block_out_channels)
        keys = jax.random.split(key, levels + 3)
        conv = lambda i, o, key: Conv2d.init(i, o, 3, padding=1, key=key, dtype=dtype)
        return cls(
            conv(cfg.latent_channels, widths[-1], keys[-1]),
            MiddleLevel.init(cfg, key=keys[-2], dtype=dtype),
            tuple(DecoderLevel.init(cfg, i, key=keys[i], dtype=dtype) for i in range(levels)),
            GroupNorm.init(widths[0], groups=cfg.norm_num_groups, eps=EPS, dtype=dtype),
            conv(widths[0], cfg.out_channels, keys[-3]),
        )

    def __call__(self, z: Float[Array, "h w latent"]) -> Float[Array, "H W channels"]:
        x = self.start(constrain(z, "rows", None, None))
        for block in self.up_blocks:
            x = constrain(block(x), "rows", None, None)
        return self.conv_out(silu(self.conv_norm_out(x)))

    def start(self, z: Float[Array, "h w latent"]) -> Float[Array, "h w c"]:
        """What precedes the first level."""
        return self.mid_block(self.conv_in(z))


class Posterior(eqx.Module):
    """The diagonal Gaussian that an image is encoded to, in the autoencoder's own space."""

    mean: Float[Array, "h w latent"]
    logvar: Float[Array, "h w latent"]

    def sample(self, noise: PRNGKey | Float[Array, "h w latent"]) -> Float[Array, "h w latent"]:
        """Draws once, in the dtype of the mean.

        **Arguments:**

        - `noise`: a key, or the unit noise itself.
        """
        dtype = at_least_float32(self.mean.dtype)
        if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
            noise = jax.random.normal(noise, self.mean.shape, dtype)
        std = jnp.exp(0.5 * self.logvar.astype(dtype))
        return (self.mean.astype(dtype) + std * noise.astype(dtype)).astype(self.mean.dtype)


class AutoencoderKL(eqx.Module):
    """Image to latent and back, one image at a time. The input's dtype decides the precision.

    A denoiser sees latents of about unit variance, `(z - shift_factor) * scaling_factor`;
    `decode` takes those, `encode` gives the autoencoder's own `z`, and `normalize` leads from the
    second to the first.
    """

    encoder: Encoder
    decoder: Decoder
    quant_conv: AbstractConv2d | None
    post_quant_conv: AbstractConv2d | None
    scaling_factor: float = eqx.field(static=True)
    shift_factor: float = eqx.field(static=True)

    @classmethod
    def init(
        cls, cfg: AutoencoderKLConfig, *, key: PRNGKey, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """A random autoencoder."""
        keys = jax.random.split(key, 4)
        latent, quant_conv, post_quant_conv = cfg.latent_channels, None, None
        if cfg.use_quant_conv:
            quant_conv = Conv2d.init(2 * latent, 2 * latent, 1, key=keys[2], dtype=dtype)
        if cfg.use_post_quant_conv:
            post_quant_conv = Conv2d.init(latent, latent, 1, key=keys[3], dtype=dtype)
        return cls(
            Encoder.init(cfg, key=keys[0], dtype=dtype),
            Decoder.init(cfg, key=keys[1], dtype=dtype),
            quant_conv,
            post_quant_conv,
            cfg.scaling_factor,
            cfg.shift_factor or 0.0,
        )

    @property
    def downscale(self) -> int:
        """How many pixels a latent pixel stands for, in each direction."""
        return 2 ** (len(self.decoder.up_blocks) - 1)

    def decode(self, latent: Float[Array, "h w latent"]) -> Float[Array, "H W channels"]:
        """The image of a denoiser's latent, about -1 (black) to 1 (white), not clipped."""
        return self.decoder(self.to_decoder(latent))

    def encode(self, image: Float[Array, "H W channels"]) -> Posterior:
        """The distribution of `z` for an image of values from -1 to 1.

        **Raises:** `ValueError` where a side is not a multiple of `downscale`.
        """
        self.latent_size(image)
        return self.from_encoder(self.encoder(image))

    def normalize(self, z: Float[Array, "h w latent"]) -> Float[Array, "h w latent"]:
        """The latent of a `z` that `encode` gives the distribution of: what a denoiser sees."""
        wide = z.astype(at_least_float32(z.dtype))
        return ((wide - self.shift_factor) * self.scaling_factor).astype(z.dtype)

    def latent_size(self, image: Float[Array, "H W channels"]) -> tuple[int, int]:
        """The height and width of an image's latent.

        **Raises:** `ValueError` where a side is not a multiple of `downscale`.
        """
        if image.shape[0] % self.downscale or image.shape[1] % self.downscale:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise ValueError(f"An image of {size} is not a multiple of {self.downscale} in size.")
        return image.shape[0] // self.downscale, image.shape[1] // self.downscale

    def to_decoder(self, latent: Float[Array, "h w latent"]) -> Float[Array, "h w latent"]:
        """What the decoder takes, of a denoiser's latent."""
        wide = latent.astype(at_least_float32(latent.dtype))
        z = (wide / self.scaling_factor + self.shift_factor).astype(latent.dtype)
        return z if self.post_quant_conv is None else self.post_quant_conv(z)

    def from_encoder(self, moments: Float[Array, "h w moments"]) -> Posterior:
        """The distribution that the encoder's output describes."""
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))
