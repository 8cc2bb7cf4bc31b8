from .._lora import CLIP_L, DENOISER, LoraBase, LoraNames
from ..unet.lora import cross_attention_base


CLIP_G = ("lora_te2_", "text_encoders.clip_g.transformer.", "text_encoders.clip_g.")

LORA = LoraNames(
    prefixes={"unet": DENOISER, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    bases=(
        cross_attention_base("SDXL", 2048),
        cross_attention_base("SDXL refiner", 1280),
        LoraBase("SDXL", r"(text_encoder_2|te2|clip_g)[._].*self_attn", 1280),
    ),
)
