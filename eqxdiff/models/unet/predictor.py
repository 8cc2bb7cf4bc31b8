"""A UNet, and one with ControlNets around it, as the samplers call them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._types import Image, Scalar
from ...sampling import AbstractNetwork, Row
from .._model import Control, Inputs
from .controlnet import ControlNet, sum_residuals
from .network import AddedConditioning, PromptKeys, Residuals, UNet


class UNetCondition(eqx.Module):
    """What a UNet is told of a prompt.

    **Fields:**

    - `context`: the prompt's hidden states, padding included, or what the UNet made of them ahead.
    - `added`: the pooled prompt and the sizes, for SDXL.
    - `wanted`: 1 for the prompt that guidance leads to, 0 for the one it leads away from.
    """

    context: Float[Array, "*roles tokens context_dim"] | PromptKeys
    added: AddedConditioning | None
    wanted: Float[Array, "*roles"]


class UNetShared(eqx.Module):
    """What a UNet is told of a picture besides its prompts.

    **Fields:**

    - `guidance`: the scale that a distilled UNet embeds.
    - `inpaint`: the mask and the latent of the masked picture, for a UNet that inpaints.
    - `controls`: one for each ControlNet.
    """

    guidance: Scalar | None
    inpaint: Float[Array, "h w more"] | None
    controls: tuple[Control, ...]

    @classmethod
    def make(cls, inputs: Inputs, guidance: Scalar | None) -> "UNetShared":
        """Puts together what the inputs of a picture have for a UNet."""
        inpaint = None
        if inputs.mask is not None and inputs.masked is not None:
            inpaint = jnp.concatenate([inputs.mask, inputs.masked], axis=-1)
        return cls(guidance, inpaint, inputs.controls)


class UNetPredictor(AbstractNetwork):
    """A UNet as `(latent, row, condition) -> output`, for one picture."""

    unet: UNet
    shared: UNetShared
    dtype: DTypeLike = eqx.field(static=True)

    def __call__(
        self, x: Image, row: Row, condition: UNetCondition, residuals: Residuals | None = None
    ) -> Image:
        latent = x
        if self.shared.inpaint is not None:
            latent = jnp.concatenate([x, self.shared.inpaint.astype(x.dtype)], axis=-1)
        context = condition.context
        output = self.unet(
            latent.astype(self.dtype),
            row.timestep,
            context if isinstance(context, PromptKeys) else context.astype(self.dtype),
            condition.added,
            guidance=self.shared.guidance,
            residuals=residuals,
        )
        return output.astype(x.dtype)

    def ahead(
        self, x: Image, timesteps: Float[Array, " rows"], condition: UNetCondition
    ) -> UNetCondition:
        """Computes the prompt's keys and values. The embedded timesteps stay in the loop: their
        layers are small."""
        assert not isinstance(condition.context, PromptKeys)
        keys = self.unet.keys(condition.context.astype(self.dtype))
        return UNetCondition(keys, condition.added, condition.wanted)

    def rest(self) -> "UNetPredictor":
        return UNetPredictor(self.unet.without_keys(), self.shared, self.dtype)


class Controlled(eqx.Module):
    """A UNet whose layers ControlNets add to. It is called as the UNet alone is."""

    network: UNetPredictor
    nets: tuple[ControlNet, ...]

    def __call__(self, x: Image, row: Row, condition: UNetCondition) -> Image:
        pairs = zip(self.nets, self.network.shared.controls, strict=True)
        residuals = [self._residuals(*pair, x, row, condition) for pair in pairs]
        return self.network(x, row, condition, sum_residuals(residuals))

    def _residuals(
        self, net: ControlNet, control: Control, x: Image, row: Row, condition: UNetCondition
    ) -> Residuals:
        """What one ControlNet adds: nothing outside its interval."""
        dtype, context = self.network.dtype, condition.context
        assert not isinstance(context, PromptKeys)
        scale = control.scale * condition.wanted if control.guess else control.scale

        def call() -> Residuals:
            return net(
                x.astype(dtype),
                row.timestep,
                context.astype(dtype),
                control.image.astype(dtype),
                condition.added,
                scale=scale,
                guess=control.guess,
            )

        nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(call))
        return jax.lax.cond(control.interval.contains(row), call, nothing)
