"""What SDXL is conditioned on besides the prompt's hidden states."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .settings import SDXLSettings


class EncodedPrompt(eqx.Module):
    """A prompt as the two text encoders see it.

    **Fields:**

    - `context`: the penultimate hidden states of both, side by side.
    - `pooled`: the projected state of the second at the end of the text.
    """

    context: Float[Array, "tokens context_dim"]
    pooled: Float[Array, " pooled"]


def time_ids(settings: SDXLSettings, *, negative: bool) -> Float[Array, "6"]:
    """Returns the original size, the crop's offset and the target size, each height and width in
    pixels.

    The picture's own size, uncut, is the default. Each negative value is by default the positive
    one.

    Source: https://arxiv.org/abs/2307.01952, section 2.2.
    """
    size = settings.height, settings.width
    original = settings.original_size or size
    crop = settings.crop or (0, 0)
    target = settings.target_size or size
    if negative:
        original = settings.negative_original_size or original
        crop = settings.negative_crop or crop
        target = settings.negative_target_size or target
    return jnp.asarray(np.array([*original, *crop, *target], np.float32))
