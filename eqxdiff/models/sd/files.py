"""The files in which Stable Diffusion 1 and 2 are published."""

from collections.abc import Mapping

from ...checkpoint.plan import Shape
from ...checkpoint.table import TableFile
from .._files import Lookalikes, PublishedFiles
from ..unet.forms import LEFTOVERS, unet_widths


LAYOUT: Mapping[str, tuple[TableFile, str]] = {
    "unet": ("unet_ldm", "model.diffusion_model"),
    "vae": ("vae_ldm", "first_stage_model"),
}
SD1 = Lookalikes(
    "Stable Diffusion 1",
    ("sd15",),
    {**LAYOUT, "text_encoder": ("clip", "cond_stage_model.transformer")},
)
SD2 = Lookalikes(
    "Stable Diffusion 2",
    ("sd21", "sd21-base", "sd2-base", "sd-turbo"),
    {**LAYOUT, "text_encoder": ("clip_openclip", "cond_stage_model.model")},
)


def recognise(kind: TableFile, shapes: Mapping[str, Shape]) -> Lookalikes | None:
    """Returns the sort of a UNet or ControlNet, by the text encoder that it is made for."""
    return {(768, None): SD1, (1024, None): SD2}.get(unet_widths(kind, shapes))  # pyright: ignore


FILES = PublishedFiles(
    (SD1, SD2), recognise, leftovers=(*LEFTOVERS, "cond_stage_model.logit_scale")
)
