"""Sample pictures of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from .._errors import CheckpointError
from ..distributed import gather_rows, is_first, to_host
from ..pipeline import Job, Pipeline, expand, generate_each, make_jobs, to_bytes
from ..sharding import BATCH_AXES
from .config import TrainConfig
from .studio import Studio, blaming, reconstruct


def sample_jobs(studio: Studio, config: TrainConfig) -> list[Job]:
    """Makes the jobs of the sample prompts, before training begins: none for an autoencoder.

    **Raises:** `SettingError`, `PromptError`.
    """
    sample, data = config.sample, config.data
    if studio.vae is None or not sample.prompts:
        return []
    given: dict[str, Any] = {"cfg": sample.cfg} if sample.cfg > 1 else {}
    given |= {"steps": sample.steps, "height": data.height, "width": data.width}
    given["max_sequence_length"] = data.max_sequence_length
    with blaming("sample"):
        requests = expand(sample.prompts, seed=sample.seed, num_images=1, given=given)
        return make_jobs(studio.blueprint, requests)


def write_samples(
    studio: Studio,
    jobs: Sequence[Job],
    modules: Mapping[str, Any],
    images: Float[np.ndarray, "n H W 3"],
    folder: Path,
) -> Path | None:
    """Writes a sheet of sample pictures under the next free number.

    **Arguments:**

    - `jobs`: the pictures that a denoiser draws.
    - `images`: the images that an autoencoder reconstructs, each shown beside its reconstruction.

    **Returns:** the path, or `None` where there are no jobs.

    **Raises:** `CheckpointError` where the sheet cannot be written.
    """
    if studio.vae is None:
        made = to_host(reconstruct(modules["vae"], jnp.asarray(images)))
        pictures = np.stack([images / 2 + 0.5, made], axis=1).reshape(-1, *images.shape[1:])
    elif not jobs:
        return None
    else:
        pipe = Pipeline({**modules, "vae": studio.vae}, studio.blueprint)
        mesh = studio.blueprint.mesh
        shares = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        made = generate_each(pipe, jobs, batch_size=-(-len(jobs) // shares) * shares)
        rows = {each.index: each.array for each in made if each.array is not None}
        pictures = gather_rows(rows, len(jobs), images.shape[1:])
    if not is_first():
        return None
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
