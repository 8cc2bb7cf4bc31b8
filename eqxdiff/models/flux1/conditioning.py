"""What FLUX.1 is told of a prompt, and how a latent becomes its tokens."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._types import Scalar


class FluxTokens(eqx.Module):
    """The tokens of a prompt for CLIP and for T5."""

    clip: Int[Array, " clip_tokens"]
    t5: Int[Array, " t5_tokens"]


class FluxCondition(eqx.Module):
    """What FLUX.1 is told of a prompt.

    **Fields:**

    - `txt`: T5's last hidden states, padding included: the model was trained without a mask.
    - `pooled`: CLIP's state at the end of the text.
    """

    txt: Float[Array, "*roles tokens text_dim"]
    pooled: Float[Array, "*roles pooled_dim"]


class FluxShared(eqx.Module):
    """What FLUX.1 is told of a picture besides its prompts: the embedded guidance scale."""

    guidance: Scalar | None


def patchify(x: Float[Array, "h w c"]) -> Float[Array, "h*w//4 4*c"]:
    """Cuts a latent into patches of 2x2. The features of a patch are channel, row, column."""
    h, w, c = x.shape
    patches = x.reshape(h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 1, 3)
    return patches.reshape(h * w // 4, 4 * c)


def unpatchify(img: Float[Array, "pixels features"], h: int, w: int) -> Float[Array, "{h} {w} c"]:
    """Puts patches together again: the inverse of `patchify`."""
    patches = img.reshape(h // 2, w // 2, -1, 2, 2).transpose(0, 3, 1, 4, 2)
    return patches.reshape(h, w, -1)


def positions(tokens: int, h: int, w: int) -> Float[Array, "{tokens}+{h}*{w}//4 3"]:
    """Returns (0, 0, 0) for each text token, then (0, row, column) of each patch."""
    row, column = jnp.meshgrid(jnp.arange(h // 2), jnp.arange(w // 2), indexing="ij")
    img = jnp.stack([jnp.zeros_like(row), row, column], axis=-1).reshape(-1, 3)
    return jnp.concatenate([jnp.zeros((tokens, 3), img.dtype), img]).astype(jnp.float32)
