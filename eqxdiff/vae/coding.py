"""Pictures to the latents that a denoiser sees, and back."""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .autoencoder import AutoencoderKL
from .tiling import decode_tiled, encode_tiled


def encode_image(
    vae: AutoencoderKL,
    image: Float[Array, "H W 3"],
    noise: Float[Array, "h w latent"],
    dtype: DTypeLike,
    *,
    tiled: bool,
) -> Float[Array, "h w latent"]:
    """Samples the latent of a picture, in float32, of about unit variance.

    **Arguments:**

    - `image`: values from -1 to 1.
    - `noise`: unit noise, with which the posterior is sampled.
    - `dtype`: what the autoencoder computes in.
    - `tiled`: whether to encode tile by tile, to save memory.
    """
    encode = encode_tiled if tiled else AutoencoderKL.encode
    z = encode(vae, image.astype(dtype)).sample(noise)
    return vae.normalize(z.astype(jnp.float32))


def decode_latent(
    vae: AutoencoderKL, latent: Float[Array, "h w latent"], dtype: DTypeLike, *, tiled: bool
) -> Float[Array, "H W 3"]:
    """Decodes a latent to a picture of values from 0 to 1, in float32."""
    decode = decode_tiled if tiled else AutoencoderKL.decode
    image = decode(vae, latent.astype(dtype)).astype(jnp.float32)
    return jnp.clip(image / 2 + 0.5, 0, 1)
