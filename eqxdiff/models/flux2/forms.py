"""How published files name the tensors of the transformer."""

from ...checkpoint.form import Form


TRANSFORMER = (
    Form("flux2_transformer", ("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",)),
    Form("flux2_transformer_bfl", ("single_stream_modulation.lin.weight",)),
)
