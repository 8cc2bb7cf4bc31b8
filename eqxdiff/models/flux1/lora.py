from .._lora import CLIP_L, DENOISER, LoraBase, LoraFormat, LoraNames


T5 = ("lora_te2_", "text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.")

XLABS = r"^(?:diffusion_model\.)?((?:double|single)_blocks\.\d+)\.processor\."
FORMATS = (
    LoraFormat(
        "xlabs",
        r"\.processor\.(qkv|proj)_lora\d?\.(down|up)",
        (
            (XLABS + r"(qkv|proj)_lora1\.(down|up)\.weight$", r"\1.img_attn.\2.lora_\3.weight"),
            (XLABS + r"(qkv|proj)_lora2\.(down|up)\.weight$", r"\1.txt_attn.\2.lora_\3.weight"),
            (XLABS + r"qkv_lora\.(down|up)\.weight$", r"\1.linear1.0-2.lora_\2.weight"),
            (XLABS + r"proj_lora\.(down|up)\.weight$", r"\1.linear2.lora_\2.weight"),
        ),
    ),
    LoraFormat(
        "bfl-control",
        r"^(double|single)_blocks\.\d+\..*norm\.(query|key)_norm\.scale$",
        ((r"_norm\.scale$", "_norm.scale.set_weight"),),
        widens=True,
    ),
    LoraFormat("onetrainer-bfl", r"^transformer\.(double|single)_blocks\.\d+\."),
    LoraFormat("onetrainer", r"^lora_transformer_"),
    LoraFormat("fal", r"^base_model\.model\.(double|single)_blocks\."),
    LoraFormat("bfl", r"^(double|single)_blocks\.\d+\..*\.lora_[AB]\."),
)

BLOCKS = r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d+[._]"

LORA = LoraNames(
    prefixes={
        "transformer": (*DENOISER, "lora_transformer_"),
        "text_encoder": CLIP_L,
        "text_encoder_2": T5,
    },
    formats=FORMATS,
    bases=(LoraBase("FLUX.1", BLOCKS, 3072), LoraBase("a model like FLUX.1", BLOCKS)),
)
