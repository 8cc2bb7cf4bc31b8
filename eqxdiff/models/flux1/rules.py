"""Sharding rules of FLUX.1: regular expressions of parameter paths -> logical axes.

What a stream is projected to is `"hidden"`, the stream itself `"embed"`.
"""

from ...sharding import Rule


TRANSFORMER: tuple[Rule, ...] = (
    (r"(x|context)_embedder\.weight", ("embed", None)),
    (r"time_text_embed\.\w+\.linear_[12]\.weight", ("embed", None)),
    (r".*\.(to_[qkv]|add_[qkv]_proj|proj_in|proj_mlp)\.weight", ("hidden", "embed")),
    (r".*\.(to_out|to_add_out|ff\.proj_out|ff_context\.proj_out)\.weight", ("embed", "hidden")),
    (r"single_transformer_blocks\.proj_out\.weight", ("embed", "hidden")),
    (r".*norm\w*\.linear\.weight", (None, "embed")),
    (r"proj_out\.weight", (None, "embed")),
    (r".*_blocks\..*\.bias", (None,)),
    (r".*_blocks\..*norm_\w+\.weight", (None,)),
)
