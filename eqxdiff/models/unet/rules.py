"""Sharding rules of UNets and ControlNets: parameter paths -> logical axes.

What a stream is projected to is `"hidden"`, the stream itself `"embed"`.
"""

from ...sharding import Rule


UNET: tuple[Rule, ...] = (
    (r"(.*\.)?conv(\d|_in|_out|_shortcut)?\.weight", ("embed", None, None, None)),
    (r"(time|add)_embedding\.(linear_[12]|cond_proj)\.weight", ("embed", None)),
    (r".*\.time_emb_proj\.weight", ("embed", None)),
    (r".*\.attentions\.\d+\.proj_(in|out)\.weight", (None, None)),  # matrix or convolution
    (r".*\.(to_[qkv]|ff\.proj_in)\.weight", ("hidden", "embed")),
    (r".*\.(to_out|ff\.proj_out)\.weight", ("embed", "hidden")),
    (r".*\.transformer_blocks\..*(norm\d|to_out|proj_in|proj_out)\.bias", (None,)),
    (r".*\.transformer_blocks\..*norm\d\.weight", (None,)),
)

CONTROLNET: tuple[Rule, ...] = (
    *UNET,
    (r"controlnet_cond_embedding\.blocks\.\d+\.weight", ("embed", None, None, None)),
    (r"controlnet_(down_blocks\.\d+|mid_block)\.weight", ("embed", None, None, None)),
)
