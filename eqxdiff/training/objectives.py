"""The losses of whole models on batches, as `train_step` takes them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from .._types import Scalar
from ..models import AbstractFamily, Guidance, Modules, Settings
from ..sampling import AbstractParameterization
from .levels import AbstractLevels
from .losses import autoencoder_loss, denoising_loss, min_snr_weight, unit_noise
from .step import Metrics


class DenoiserObjective(eqx.Module):
    """The denoising loss of a family's text encoders and network.

    The batch is `(latents, tokens)`: clean latents of unit variance, and for each text encoder the
    tokens of the captions.

    **Fields:**

    - `guidance`: the scale that is told to a network that embeds one.
    - `parameterization`: what the network predicts.
    - `gamma`: of the min-SNR weights, or `None` for none.
    - `settings`: what the network is told besides the prompt.
    - `dtype`: of the activations.
    """

    family: AbstractFamily
    levels: AbstractLevels
    guidance: Guidance
    parameterization: AbstractParameterization
    gamma: float | None
    settings: Settings = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __call__(
        self,
        modules: Modules,
        batch: tuple[Float[Array, "n h w c"], dict[str, Int[Array, "n tokens"]]],
        keys: Key[Array, " n"],
    ) -> tuple[Scalar, Metrics]:
        def one(latent: Array, tokens: dict[str, Array], key: Array) -> Scalar:
            level_key, noise_key = jax.random.split(key)
            skip = self.settings.clip_skip or 0
            encoded = self.family.encode(modules, tokens, skip, self.dtype)
            conditioning = self.family.condition(self.settings, encoded, negative=False)
            denoiser = self.family.denoiser(
                modules,
                conditioning,
                None,
                self.guidance,
                (),
                self.parameterization,
                self.dtype,
            )
            row = self.levels.sample(level_key)
            loss = denoising_loss(denoiser, latent, unit_noise(noise_key, latent), row)
            if self.gamma is None:
                return loss
            return loss * min_snr_weight(row, denoiser.parameterization, self.gamma)

        latents, tokens = batch
        return jnp.mean(jax.vmap(one)(latents, tokens, keys)), {}


class AutoencoderObjective(eqx.Module):
    """The loss of `modules["vae"]` on a batch of images from -1 to 1."""

    kl_weight: float
    edge_weight: float
    dtype: Any = eqx.field(static=True)

    def __call__(
        self, modules: Modules, batch: Float[Array, "n H W 3"], keys: Key[Array, " n"]
    ) -> tuple[Scalar, Metrics]:
        def one(image: Array, key: Array) -> tuple[Scalar, Metrics]:
            return autoencoder_loss(
                modules["vae"],
                image.astype(self.dtype),
                key,
                kl_weight=self.kl_weight,
                edge_weight=self.edge_weight,
            )

        losses, metrics = jax.vmap(one)(batch, keys)
        return jnp.mean(losses), jax.tree.map(jnp.mean, metrics)
