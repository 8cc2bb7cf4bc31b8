"""The losses of training: pure functions of one example. The batch comes by `jax.vmap`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._dtypes import at_least_float32
from .._types import Image, PRNGKey, Scalar
from ..sampling import AbstractParameterization, Denoiser, Row, add_noise
from ..sampling.schedule import X
from ..vae import AutoencoderKL, Posterior


def denoising_loss(denoiser: Denoiser, x0: X, noise: X, row: Row) -> Scalar:
    """Computes the mean squared error of the network's output at `alpha * x0 + sigma * noise`.

    The output should be the parameterization's `target`: the noise, v, the data, or the velocity of
    a rectified flow. The loss is in at least float32.

    **Arguments:**

    - `x0`: clean data, such as a latent of unit variance.
    - `noise`: unit noise of the same shape.
    - `row`: the noise level.
    """
    output = denoiser.predict(add_noise(x0, noise, row), row)
    wide = at_least_float32(output.dtype)
    target = denoiser.parameterization.target(x0, noise, row)
    return jnp.mean(jnp.square(output.astype(wide) - target.astype(wide)))


def min_snr_weight(
    row: Row, parameterization: AbstractParameterization, gamma: float = 5.0
) -> Scalar:
    """Returns the weight that makes `denoising_loss` `min(snr, gamma)` times the error of x0.

    The weight is `min(snr, gamma) / snr` for epsilon, `min(snr, gamma) / (snr + 1)` for v and
    `min(snr, gamma)` for x0. It is 0 at a level of pure noise, where epsilon says nothing of x0.

    Source: https://arxiv.org/abs/2303.09556, section 3.4.
    """
    one, zero = jnp.ones_like(row.sigma), jnp.zeros_like(row.sigma)
    # x0 is linear in the output, with this slope.
    slope = parameterization.denoised(zero, one, row)
    snr = jnp.square(row.alpha / jnp.maximum(row.sigma, jnp.finfo(row.sigma.dtype).tiny))
    return jnp.minimum(snr, gamma) * jnp.square(slope)


def kl_divergence(posterior: Posterior) -> Scalar:
    """Computes the divergence of the posterior from the unit Gaussian, in nats per number of the
    latent."""
    wide = at_least_float32(posterior.mean.dtype)
    mean, logvar = posterior.mean.astype(wide), posterior.logvar.astype(wide)
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)


def edges(image: Image) -> tuple[Float[Array, "H w c"], Float[Array, "h W c"]]:
    """Returns the differences between neighbouring pixels, across and down."""
    return image[:, 1:] - image[:, :-1], image[1:] - image[:-1]


def reconstruction_loss(output: Image, image: Image, edge_weight: float) -> Scalar:
    """Adds the mean absolute error of the pixels and `edge_weight` times the error of the `edges`.

    The edges keep lines sharp, so that the loss needs no second network to judge pictures.
    """
    wide = at_least_float32(output.dtype)
    output, image = output.astype(wide), image.astype(wide)
    error = lambda a, b: jnp.mean(jnp.abs(a - b))
    apart = sum(map(error, edges(output), edges(image)), jnp.zeros((), wide))
    return error(output, image) + edge_weight * apart


def autoencoder_loss(
    vae: AutoencoderKL, image: Image, key: PRNGKey, *, kl_weight: float, edge_weight: float
) -> tuple[Scalar, dict[str, Scalar]]:
    """Adds the loss of an image's reconstruction from a draw of its posterior and `kl_weight` times
    the posterior's divergence.

    **Returns:** the loss, and its parts: `"reconstruction"` and `"kl"`.
    """
    posterior = vae.encode(image)
    output = vae.decode(vae.normalize(posterior.sample(key)))
    reconstruction = reconstruction_loss(output, image, edge_weight)
    kl = kl_divergence(posterior)
    return reconstruction + kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}


def unit_noise(key: PRNGKey, x0: X) -> X:
    """Draws unit noise of the shape of `x0`, in at least float32."""
    return jax.random.normal(key, x0.shape, at_least_float32(x0.dtype))
