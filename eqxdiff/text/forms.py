"""How published files name the tensors of the text encoders."""

from ..checkpoint.form import Form


CLIP = (
    Form(
        "clip",
        ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
    ),
    Form("clip_openclip", ("transformer.resblocks.0.attn.in_proj_weight",)),
)
T5 = (Form("t5", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),)
QWEN3 = (Form("qwen3", ("layers.0.self_attn.q_norm.weight",)),)
