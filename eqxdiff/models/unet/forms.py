"""How published files name the tensors of UNets and ControlNets, and what tells UNets apart."""

from collections.abc import Mapping

from ...checkpoint.form import Form
from ...checkpoint.plan import Shape
from ...checkpoint.table import TableFile


UNET = (
    Form("unet", ("up_blocks.0.resnets.0.time_emb_proj.weight",)),
    Form("unet_ldm", ("output_blocks.11.0.in_layers.0.weight",)),
    Form(
        "unet_sgm",
        ("output_blocks.8.0.in_layers.0.weight",),
        absent="output_blocks.9.0.in_layers.0.weight",
    ),
)
CONTROLNET = (
    Form("controlnet", ("controlnet_cond_embedding.conv_in.weight",)),
    Form("controlnet_ldm", ("input_hint_block.0.weight",)),
)

ADDED = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")

LEFTOVERS = (
    *("alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("posterior_variance", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar", "lvlb_weights"),
    *("model_ema", "scale_factor", "first_stage_model.loss", "embedding_manager"),
    *("global_step", "iteration"),
)
"""What the single files of these families hold besides components: constants of the noise schedule,
the averages that training kept, its losses, and what only other programs read."""


def unet_widths(kind: TableFile, shapes: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """Returns the lengths of a token's state and of the added conditioning of a UNet or ControlNet.

    Each is `None` where the component has no such layer, or is of another kind.
    """
    if kind not in (UNET[0].table, CONTROLNET[0].table):
        return None, None
    return _width(shapes, ("attn2.to_k.weight",)), _width(shapes, ADDED)


def _width(shapes: Mapping[str, Shape], ends: tuple[str, ...]) -> int | None:
    return next((s[1] for name, s in shapes.items() if name.endswith(ends) and len(s) > 1), None)
