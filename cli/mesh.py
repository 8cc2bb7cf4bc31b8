"""The options `--mesh data=4,fsdp=2` and `--attention-blocks 512,1024`, and the batch size that a
mesh allows."""

import math
import re

from jax.sharding import Mesh

from eqxdiff import SettingError
from eqxdiff.models import check_range
from eqxdiff.sharding import BATCH_AXES, check_batch, parse_mesh


def mesh_of(text: str | None) -> Mesh | None:
    """Makes the mesh of devices that the option asks for. **Raises:** `SettingError`."""
    return None if text is None else parse_mesh(text)


def parse_blocks(text: str | None) -> tuple[int, int] | None:
    """Reads how many queries and keys attention works on at a time. **Raises:** `SettingError`."""
    if text is None:
        return None
    pair = re.fullmatch(r"([1-9]\d{0,5})\s*,\s*([1-9]\d{0,5})", text.strip())
    if pair is None:
        raise SettingError(
            f"--attention-blocks {text} is not understood: write the queries and the keys of a "
            "block, as in 512,1024."
        )
    return int(pair[1]), int(pair[2])


def batch_size_for(mesh: Mesh | None, wanted: int | None) -> int:
    """Returns the number of pictures of a batch, by default one for each share of the mesh.

    **Raises:** `SettingError` where the mesh cannot split the batch.
    """
    shares = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    size = shares if wanted is None else wanted
    check_range("batch_size", size, 1)
    check_batch(mesh, size)
    return size
