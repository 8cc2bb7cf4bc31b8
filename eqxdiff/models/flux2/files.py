"""The files in which FLUX.2 is published."""

from collections.abc import Mapping

from ...checkpoint.plan import Shape
from ...checkpoint.table import TableFile
from .._files import Lookalikes, PublishedFiles
from .forms import TRANSFORMER


def _layout(qwen: str) -> Mapping[str, tuple[TableFile, str]]:
    return {
        "transformer": ("flux2_transformer_bfl", "model.diffusion_model"),
        "text_encoder": ("qwen3", f"text_encoders.{qwen}.transformer.model"),
        "vae": ("vae_ldm", "vae"),
    }


SORTS = {
    3072: Lookalikes(
        "FLUX.2 [klein] 4B",
        ("flux2-klein-4b", "flux2-klein-base-4b"),
        _layout("qwen3_4b"),
    ),
    4096: Lookalikes(
        "FLUX.2 [klein] 9B",
        ("flux2-klein-9b", "flux2-klein-base-9b"),
        _layout("qwen3_8b"),
    ),
    6144: Lookalikes("FLUX.2 [dev]", (), {}),
}
"""The sorts of transformers by their width."""

WIDTH = ("img_in.weight", "x_embedder.weight")


def recognise(kind: TableFile, shapes: Mapping[str, Shape]) -> Lookalikes | None:
    """Returns the sort of a transformer, which its width tells."""
    if kind != TRANSFORMER[0].table:
        return None
    widths = (shape[0] for name, shape in shapes.items() if name.endswith(WIDTH))
    return SORTS.get(next(widths, 0))


FILES = PublishedFiles(
    tuple(SORTS.values()),
    recognise,
    leftovers=(
        *(f"text_encoders.{qwen}.logit_scale" for qwen in ("qwen3_4b", "qwen3_8b")),
        *(f"text_encoders.{qwen}.transformer.lm_head" for qwen in ("qwen3_4b", "qwen3_8b")),
    ),
)
