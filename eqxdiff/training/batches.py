"""The batch of each step: images, or latents with the tokens of their captions."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from ..models import PROMPT
from .config import TrainConfig
from .data import CaptionedImage, batch_of, dropped, pick
from .studio import Studio


Batches = Callable[[int], PyTree]
"""Makes the batch of a step from the number of the step alone."""


def image_batches(config: TrainConfig, images: Float[np.ndarray, "n H W 3"]) -> Batches:
    """Returns the batches that train an autoencoder."""
    run = config.run
    return lambda step: jnp.asarray(images[batch_of(step, run.batch_size, len(images), run.seed)])


def latent_batches(
    studio: Studio,
    config: TrainConfig,
    examples: Sequence[CaptionedImage],
    latents: Float[np.ndarray, "n h w c"],
) -> Batches:
    """Returns the batches that train a denoiser: latents, and tokens of one caption of each.

    All captions are tokenized at once. **Raises:** `PromptError`.
    """
    model, tokenizers = studio.blueprint.model, studio.blueprint.tokenizers
    texts = ["", *(caption for example in examples for caption in example.captions)]
    tokenized = [model.tokenize(tokenizers, text, studio.settings, PROMPT).tokens for text in texts]
    tokens = jax.tree.map(lambda *rows: np.stack(rows), *tokenized)
    counts = np.array([len(example.captions) for example in examples])
    first = 1 + np.cumsum(counts) - counts
    run = config.run

    def batch(step: int) -> PyTree:
        chosen = batch_of(step, run.batch_size, len(latents), run.seed)
        text = first[chosen] + pick(step, counts[chosen], run.seed)
        text = np.where(dropped(step, len(chosen), config.data.caption_dropout, run.seed), 0, text)
        return jnp.asarray(latents[chosen]), jax.tree.map(
            lambda rows: jnp.asarray(rows[text]), tokens
        )

    return batch
