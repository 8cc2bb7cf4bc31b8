"""How published files name the tensors of the transformer."""

from ...checkpoint.form import Form


TRANSFORMER = (
    Form("flux1_transformer", ("single_transformer_blocks.0.proj_mlp.weight",)),
    Form("flux1_transformer_bfl", ("double_blocks.0.img_mod.lin.weight",)),
)
