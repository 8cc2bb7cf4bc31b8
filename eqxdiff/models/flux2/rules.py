"""Sharding rules of FLUX.2: regular expressions of parameter paths -> logical axes.

What a stream is projected to is `"hidden"`, the stream itself `"embed"`.
"""

from ...sharding import Rule


TRANSFORMER: tuple[Rule, ...] = (
    (r"(x|context)_embedder\.weight", ("embed", None)),
    (r"time_guidance_embed\.\w+\.linear_[12]\.weight", ("embed", None)),
    (r"transformer_blocks\.attn\.(to_[qkv]|add_[qkv]_proj)\.weight", ("hidden", "embed")),
    (r"single_transformer_blocks\.attn\.to_qkv_mlp_proj\.weight", ("hidden", "embed")),
    (r".*\.(to_out|to_add_out|linear_out)\.weight", ("embed", "hidden")),
    (r".*\.linear_in\.weight", ("hidden", "embed")),
    (r"(\w+_modulation\w*|norm_out)\.linear\.weight", (None, "embed")),
    (r"proj_out\.weight", (None, "embed")),
    (r".*_blocks\..*norm_\w+\.weight", (None,)),
)
