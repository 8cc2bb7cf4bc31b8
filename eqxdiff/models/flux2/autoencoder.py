"""FLUX.2's autoencoder: a KL autoencoder whose latents are cut into patches and normalised by the
statistics of the training set, which a batch norm has collected.

Source: `AutoencoderKLFlux2` and `Flux2KleinPipeline` of diffusers.
"""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._dtypes import at_least_float32
from ..._types import PRNGKey
from ...nn import AbstractConv2d
from ...vae import AutoencoderKL, decode_latent, encode_image
from ...vae.autoencoder import Decoder, Encoder
from .config import PATCH, AutoencoderKLFlux2Config


def patchify(x: Float[Array, "h w c"]) -> Float[Array, "h//2 w//2 4*c"]:
    """Cuts a latent into patches of 2x2. The features of a patch are channel, row, column."""
    h, w, c = x.shape
    patches = x.reshape(h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(0, 2, 4, 1, 3)
    return patches.reshape(h // PATCH, w // PATCH, PATCH**2 * c)


def unpatchify(x: Float[Array, "h w features"]) -> Float[Array, "2*h 2*w c"]:
    """Puts patches together again: the inverse of `patchify`."""
    h, w, features = x.shape
    patches = x.reshape(h, w, features // PATCH**2, PATCH, PATCH).transpose(0, 3, 1, 4, 2)
    return patches.reshape(PATCH * h, PATCH * w, features // PATCH**2)


class LatentStatistics(eqx.Module):
    """Mean and variance of each channel of the patches."""

    running_mean: Float[Array, " channels"]
    running_var: Float[Array, " channels"]
    eps: float = eqx.field(static=True)

    @classmethod
    def init(cls, channels: int, *, eps: float, dtype: DTypeLike) -> Self:
        return cls(jnp.zeros(channels, dtype), jnp.ones(channels, dtype), eps)

    def normalize(self, x: Float[Array, "h w channels"]) -> Float[Array, "h w channels"]:
        """Scales patches to unit variance, in at least float32."""
        mean, std = self._moments(x)
        return (x - mean) / std

    def restore(self, x: Float[Array, "h w channels"]) -> Float[Array, "h w channels"]:
        """Does the inverse of `normalize`."""
        mean, std = self._moments(x)
        return x * std + mean

    def _moments(self, x: Array) -> tuple[Array, Array]:
        dtype = at_least_float32(x.dtype)
        return self.running_mean.astype(dtype), jnp.sqrt(self.running_var.astype(dtype) + self.eps)


class AutoencoderKLFlux2(eqx.Module):
    """Picture to normalised patches and back, one picture at a time."""

    encoder: Encoder
    decoder: Decoder
    quant_conv: AbstractConv2d | None
    post_quant_conv: AbstractConv2d | None
    bn: LatentStatistics

    @classmethod
    def init(
        cls, cfg: AutoencoderKLFlux2Config, *, key: PRNGKey, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """A random autoencoder."""
        kl = AutoencoderKL.init(cfg.kl, key=key, dtype=dtype)
        bn = LatentStatistics.init(cfg.channels, eps=cfg.batch_norm_eps, dtype=dtype)
        return cls(kl.encoder, kl.decoder, kl.quant_conv, kl.post_quant_conv, bn)

    @property
    def kl(self) -> AutoencoderKL:
        """The autoencoder of latents as they are."""
        parts = self.encoder, self.decoder, self.quant_conv, self.post_quant_conv
        return AutoencoderKL(*parts, 1.0, 0.0)

    def encode(
        self,
        image: Float[Array, "H W 3"],
        noise: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "h w channels"]:
        """Samples the patches of a picture of values from -1 to 1, in float32.

        **Arguments:**

        - `noise`: unit noise, with which the posterior is sampled; zeros give its mean.
        """
        z = encode_image(self.kl, image, unpatchify(noise), dtype, tiled=tiled)
        return self.bn.normalize(patchify(z))

    def decode(
        self, latent: Float[Array, "h w channels"], dtype: DTypeLike, *, tiled: bool
    ) -> Float[Array, "H W 3"]:
        """Decodes patches to a picture of values from 0 to 1, in float32."""
        return decode_latent(self.kl, unpatchify(self.bn.restore(latent)), dtype, tiled=tiled)
