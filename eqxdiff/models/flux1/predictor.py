"""The transformer as the samplers call it."""

import equinox as eqx
from jaxtyping import DTypeLike

from ..._types import Image
from ...sampling import Row
from .conditioning import FluxCondition, FluxShared, patchify, positions, unpatchify
from .network import Transformer


class FluxPredictor(eqx.Module):
    """The transformer as `(latent, row, condition) -> velocity`, for one picture."""

    transformer: Transformer
    shared: FluxShared
    dtype: DTypeLike = eqx.field(static=True)

    def __call__(self, x: Image, row: Row, condition: FluxCondition) -> Image:
        h, w, _ = x.shape
        velocity = self.transformer(
            patchify(x).astype(self.dtype),
            condition.txt.astype(self.dtype),
            condition.pooled.astype(self.dtype),
            row.timestep,
            self.shared.guidance,
            positions(condition.txt.shape[0], h, w),
        )
        return unpatchify(velocity, h, w).astype(x.dtype)
