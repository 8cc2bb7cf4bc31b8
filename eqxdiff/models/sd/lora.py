from .._lora import CLIP_L, DENOISER, LoraBase, LoraNames
from ..unet.lora import cross_attention_base


LORA = LoraNames(
    prefixes={"unet": DENOISER, "text_encoder": CLIP_L},
    bases=(
        cross_attention_base("SD 2", 1024),
        cross_attention_base("SD 1.5", 768),
        LoraBase("SD 2", r"^(text_encoder|lora_te)[._].*self_attn", 1024),
    ),
)
