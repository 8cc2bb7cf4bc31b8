"""The files in which FLUX.1 is published."""

from collections.abc import Mapping

from ...checkpoint.plan import Shape
from ...checkpoint.table import TableFile
from .._files import Lookalikes, PublishedFiles
from .forms import TRANSFORMER


LAYOUT: Mapping[str, tuple[TableFile, str]] = {
    "transformer": ("flux1_transformer_bfl", "model.diffusion_model"),
    "text_encoder": ("clip", "text_encoders.clip_l.transformer"),
    "text_encoder_2": ("t5", "text_encoders.t5xxl.transformer"),
    "vae": ("vae_ldm", "vae"),
}
DEV = Lookalikes("FLUX.1 [dev]", ("flux-dev",), LAYOUT)
SCHNELL = Lookalikes("FLUX.1 [schnell]", ("flux-schnell",), LAYOUT)

GUIDANCE = ("guidance_in.in_layer.weight", "guidance_embedder.linear_1.weight")


def recognise(kind: TableFile, shapes: Mapping[str, Shape]) -> Lookalikes | None:
    """Returns the sort of a transformer: only that of [dev] is told the guidance."""
    if kind != TRANSFORMER[0].table:
        return None
    return DEV if any(name.endswith(GUIDANCE) for name in shapes) else SCHNELL


FILES = PublishedFiles(
    (DEV, SCHNELL),
    recognise,
    leftovers=("text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale"),
)
