"""What FLUX.2 is told of a prompt and of reference pictures, and where its tokens are."""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

from ..._types import Scalar


REFERENCE_DISTANCE = 10
"""How far apart reference pictures are, and the first from the picture itself, on the first axis of
the positions."""


class Flux2Tokens(eqx.Module):
    """The tokens of a prompt in its chat, and how many of them are not padding."""

    ids: Int[Array, " tokens"]
    length: Int[Array, ""]


class Flux2Condition(eqx.Module):
    """What FLUX.2 is told of a prompt: Qwen3's states at three depths, padding included."""

    txt: Float[Array, "*roles tokens text_dim"]


class Flux2Shared(eqx.Module):
    """What FLUX.2 is told of a picture besides its prompts.

    **Fields:**

    - `references`: the patches of each reference picture.
    - `guidance`: the embedded guidance scale, in models that embed one.
    """

    references: tuple[Float[Array, "_ _ channels"], ...]
    guidance: Scalar | None


def positions(tokens: int, sizes: list[tuple[int, int]]) -> Float[np.ndarray, "all 4"]:
    """Returns (picture, row, column, place in the text) of each text token and then of each patch.

    **Arguments:**

    - `sizes`: height and width in patches of the picture and then of each reference.
    """
    txt = np.zeros((tokens, 4))
    txt[:, 3] = np.arange(tokens)
    grids = [np.indices((1, h, w, 1)).reshape(4, -1).T for h, w in sizes]
    for number, grid in enumerate(grids):
        grid[:, 0] = REFERENCE_DISTANCE * number
    return np.concatenate([txt, *grids]).astype(np.float32)
