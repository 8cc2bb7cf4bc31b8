"""The transformer as the samplers call it."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import DTypeLike

from ..._types import Image
from ...sampling import Row
from .conditioning import Flux2Condition, Flux2Shared, positions
from .network import Flux2Transformer


class Flux2Predictor(eqx.Module):
    """The transformer as `(latent, row, condition) -> velocity`, for one picture."""

    transformer: Flux2Transformer
    shared: Flux2Shared
    dtype: DTypeLike = eqx.field(static=True)

    def __call__(self, x: Image, row: Row, condition: Flux2Condition) -> Image:
        h, w, channels = x.shape
        pictures = [x, *self.shared.references]
        sizes = [(each.shape[0], each.shape[1]) for each in pictures]
        img = jnp.concatenate([each.reshape(-1, channels) for each in pictures])
        velocity = self.transformer(
            img.astype(self.dtype),
            condition.txt.astype(self.dtype),
            row.timestep,
            self.shared.guidance,
            jnp.asarray(positions(condition.txt.shape[0], sizes)),
        )
        return velocity[: h * w].reshape(x.shape).astype(x.dtype)
