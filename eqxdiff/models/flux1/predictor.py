"""The transformer as the samplers call it."""

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float

from ..._types import Image
from ...sampling import AbstractNetwork, Row, RowTable
from .conditioning import FluxCondition, FluxShared, patchify, positions, unpatchify
from .network import Transformer


class FluxAhead(eqx.Module):
    """What `FluxPredictor` computes of a prompt ahead.

    **Fields:**

    - `txt`: the embedded text.
    - `pe`: the cosines and sines of the positions.
    - `modulations`: the `Modulations` of each timestep.
    """

    txt: Float[Array, "*roles tokens dim"]
    pe: Float[Array, "*roles places 2 half"]
    modulations: RowTable


class FluxPredictor(AbstractNetwork):
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

    def ahead(
        self, x: Image, timesteps: Float[Array, " rows"], condition: FluxCondition
    ) -> FluxAhead:
        """Embeds the text, the timesteps and the positions, and computes all modulations."""
        h, w, _ = x.shape
        transformer, pooled = self.transformer, condition.pooled.astype(self.dtype)
        embed = lambda t: transformer.time_text_embed(t, self.shared.guidance, pooled)
        table = RowTable(timesteps, transformer.modulations(jax.vmap(embed)(timesteps)))
        txt = transformer.context_embedder(condition.txt.astype(self.dtype))
        return FluxAhead(txt, transformer.rope(positions(txt.shape[0], h, w)), table)

    def rest(self) -> "FluxFlow":
        return FluxFlow(self.transformer.modulated(None), self.dtype)


class FluxFlow(eqx.Module):
    """The transformer without its modulation, for what `FluxPredictor` computed ahead."""

    transformer: Transformer
    dtype: DTypeLike = eqx.field(static=True)

    def __call__(self, x: Image, row: Row, condition: FluxAhead) -> Image:
        h, w, _ = x.shape
        transformer = self.transformer.modulated(condition.modulations(row.timestep))
        img = patchify(x).astype(self.dtype)
        velocity, _ = transformer.flow(img, condition.txt, None, condition.pe)
        return unpatchify(velocity, h, w).astype(x.dtype)
