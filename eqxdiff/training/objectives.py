"""The losses of whole models on batches, in the form that `train_step` takes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, Shaped

from .._dtypes import float32_products
from .._types import Scalar
from ..kernels import AttentionChoice, attending
from ..models import PROMPT, AbstractModel, Inputs, Modules, Settings
from ..sampling import AbstractParameterization, Conditioned, Denoiser, FlowSchedulerConfig
from .config import TrainConfig
from .levels import AbstractLevels, Discrete, LogitNormal, Uniform
from .losses import autoencoder_loss, denoising_loss, min_snr_weight, unit_noise
from .step import Loss, Metrics
from .studio import Studio


class DenoiserObjective(eqx.Module):
    """The mean denoising loss of a model's text encoders and network on a batch.

    The batch is `(latents, tokens)`: clean latents of unit variance, and the tokens of the captions
    as the model's `tokenize` returns them, each array with a leading axis of examples.

    **Fields:**

    - `levels`: the distribution of the noise levels.
    - `parameterization`: the meaning of the network's output.
    - `gamma`: the constant of `min_snr_weight`; `None` weighs all levels alike.
    - `settings`: the settings of the pictures, such as their size. They are compiled in.
    - `dtype`: the dtype of the activations.
    - `attention`: the backends of attention.
    """

    model: AbstractModel
    levels: AbstractLevels
    parameterization: AbstractParameterization
    gamma: float | None
    settings: Settings = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    attention: AttentionChoice | None = eqx.field(static=True, default=None)

    def __call__(
        self,
        modules: Modules,
        batch: tuple[Float[Array, "n h w c"], PyTree[Shaped[Array, "n ..."]]],
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
        with float32_products(self.dtype), attending(self.attention):
            return jnp.mean(jax.vmap(one)(latents, tokens, keys)), {}


class AutoencoderObjective(eqx.Module):
    """The mean `autoencoder_loss` of `modules["vae"]` on a batch of images from -1 to 1.

    **Fields:**

    - `kl_weight`, `edge_weight`: as of `autoencoder_loss`.
    - `dtype`: the dtype of the activations.
    - `attention`: the backends of attention.
    """

    kl_weight: float
    edge_weight: float
    dtype: Any = eqx.field(static=True)
    attention: AttentionChoice | None = eqx.field(static=True, default=None)

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

        with float32_products(self.dtype), attending(self.attention):
            losses, metrics = jax.vmap(one)(batch, keys)
        return jnp.mean(losses), jax.tree.map(jnp.mean, metrics)


def make_objective(studio: Studio, config: TrainConfig) -> Loss:
    """Returns the loss that a config asks for: of the denoiser, or of the autoencoder alone."""
    fields, blueprint = config.loss, studio.blueprint
    if studio.vae is None:
        return AutoencoderObjective(
            fields.kl_weight, fields.edge_weight, blueprint.compute_dtype, blueprint.attention
        )
    scheduler = blueprint.configs["scheduler"]
    if not isinstance(scheduler, FlowSchedulerConfig):
        levels = Discrete.init(scheduler)
    elif fields.levels == "uniform":
        levels = Uniform(fields.shift)
    else:
        levels = LogitNormal(fields.mean, fields.std, fields.shift)
    return DenoiserObjective(
        blueprint.model,
        levels,
        blueprint.model.recipe(studio.settings).parameterization,
        fields.min_snr_gamma or None,
        studio.settings,
        blueprint.compute_dtype,
        blueprint.attention,
    )
