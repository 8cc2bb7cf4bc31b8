"""The files in which Stable Diffusion XL is published."""

from collections.abc import Mapping

from ...checkpoint.plan import Shape
from ...checkpoint.table import TableFile
from .._files import Lookalikes, PublishedFiles
from ..unet.forms import LEFTOVERS, unet_widths


BASE = Lookalikes(
    "Stable Diffusion XL",
    ("sdxl", "sdxl-turbo"),
    {
        "unet": ("unet_sgm", "model.diffusion_model"),
        "vae": ("vae_ldm", "first_stage_model"),
        "text_encoder": ("clip", "conditioner.embedders.0.transformer"),
        "text_encoder_2": ("clip_openclip", "conditioner.embedders.1.model"),
    },
)
REFINER = Lookalikes("the refiner of Stable Diffusion XL", (), {})


def recognise(kind: TableFile, shapes: Mapping[str, Shape]) -> Lookalikes | None:
    """Returns the sort of a UNet or ControlNet, by what it is conditioned on."""
    return {(2048, 2816): BASE, (1280, 2560): REFINER}.get(unet_widths(kind, shapes))  # pyright: ignore


FILES = PublishedFiles(
    (BASE, REFINER),
    recognise,
    leftovers=(
        *(*LEFTOVERS, "denoiser.log_sigmas", "denoiser.sigmas"),
        *("text_encoders.clip_g.logit_scale", "v_pred", "ztsnr"),
    ),
    # by these fine-tunes tell how they were trained
    marks={
        "v_pred": {"prediction_type": "v_prediction"},
        "ztsnr": {"rescale_betas_zero_snr": True},
    },
)
