"""The losses of whole models on batches, as `train_step` takes them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from .._dtypes import float32_products
from .._types import Scalar
from ..models import PROMPT, AbstractModel, Inputs, Modules, Settings
from ..sampling import AbstractParameterization, Conditioned, Denoiser
from .levels import AbstractLevels
from .losses import autoencoder_loss, denoising_loss, min_snr_weight, unit_noise
from .step import Metrics


class DenoiserObjective(eqx.Module):
    """The denoising loss of a model's text encoders and network.

    The batch is `(latents, tokens)`: clean latents of unit variance, and the tokens of the captions
    as the model's `tokenize` returns them.

    **Fields:**

    - `parameterization`: what the network predicts.
    - `gamma`: of the min-SNR weights, or `None` for none.
    - `settings`: what the network is told besides the prompt.
    - `dtype`: of the activations.
    """

    model: AbstractModel
    levels: AbstractLevels
    parameterization: AbstractParameterization
    gamma: float | None
    settings: Settings = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __call__(
        self,
        modules: Modules,
        batch: tuple[Float[Array, "n h w c"], PyTree[Int[Array, "n _"]]],
        keys: Key[Array, " n"],
    ) -> tuple[Scalar, Metrics]:
        def one(latent: Array, tokens: PyTree, key: Array) -> Scalar:
            level_key, noise_key = jax.random.split(key)
            model, settings = self.model, self.settings
            encoded = model.encode(modules, tokens, self.dtype)
            condition = model.condition(encoded, settings, PROMPT)
            network = model.network(modules, model.shared(Inputs(), settings), self.dtype)
            denoiser = Denoiser(Conditioned(network, condition), self.parameterization)
            row = self.levels.sample(level_key)
            loss = denoising_loss(denoiser, latent, unit_noise(noise_key, latent), row)
            if self.gamma is None:
                return loss
            return loss * min_snr_weight(row, self.parameterization, self.gamma)

        latents, tokens = batch
        with float32_products(self.dtype):
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

        with float32_products(self.dtype):
            losses, metrics = jax.vmap(one)(batch, keys)
        return jnp.mean(losses), jax.tree.map(jnp.mean, metrics)
