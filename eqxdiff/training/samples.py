"""Sample pictures of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from .._errors import CheckpointError
from ..pipeline import Pipeline, generate, to_bytes
from .config import TrainConfig
from .studio import Studio, reconstruct


def write_samples(
    studio: Studio,
    config: TrainConfig,
    modules: Mapping[str, Any],
    images: Float[np.ndarray, "n H W 3"],
    folder: Path,
) -> Path | None:
    """Writes a sheet of sample pictures under the next free number.

    A denoiser draws the prompts. An autoencoder is shown by images, each beside its reconstruction.

    **Returns:** the path, or `None` where the config has no prompts.

    **Raises:** `CheckpointError` where the sheet cannot be written.
    """
    sample = config.sample
    if studio.vae is None:
        chosen = images[np.linspace(0, len(images) - 1, sample.count).astype(int)]
        made = np.asarray(reconstruct(modules["vae"], jnp.asarray(chosen)))
        pictures = np.stack([chosen / 2 + 0.5, made], axis=1).reshape(-1, *chosen.shape[1:])
    elif not sample.prompts:
        return None
    else:
        data = config.data
        given: dict[str, Any] = {"cfg": sample.cfg} if sample.cfg > 1 else {}
        pictures = generate(
            Pipeline({**modules, "vae": studio.vae}, studio.blueprint),
            sample.prompts,
            seed=sample.seed,
            batch_size=len(sample.prompts),
            steps=sample.steps,
            height=data.height,
            width=data.width,
            max_sequence_length=data.max_sequence_length,
            **given,
        ).arrays
    path = folder / f"{len(list(folder.glob('*.png'))):04d}.png"
    try:
        folder.mkdir(exist_ok=True)
        sheet(pictures).save(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from None
    return path


def sheet(pictures: Float[np.ndarray, "n H W 3"], columns: int = 8) -> Image.Image:
    """Puts pictures from 0 to 1 side by side, row by row, into one image."""
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    whole = np.ones((rows * height, columns * width, 3), np.float32)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        whole[top : top + height, left : left + width] = picture
    return Image.fromarray(to_bytes(np.clip(whole, 0, 1)))
