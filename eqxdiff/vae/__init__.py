"""The KL autoencoder: images to latents and back."""

from .autoencoder import AutoencoderKL as AutoencoderKL, Posterior as Posterior
from .coding import decode_latent as decode_latent, encode_image as encode_image
from .config import AutoencoderKLConfig as AutoencoderKLConfig
from .tiling import decode_tiled as decode_tiled, encode_tiled as encode_tiled
