from .._lora import DENOISER, LoraBase, LoraFormat, LoraNames


QWEN = ("lora_te1_", "lora_te_", "text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.")

FORMATS = (
    LoraFormat(
        "short-names",
        r"(?:^|\.)sformer_blocks\.\d+\.",
        ((r"((?:^|\.))sformer_blocks\.", r"\1transformer_blocks."),),
    ),
)

BLOCKS = r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d+[._]"
SINGLE = r"single_(blocks[._]\d+[._]linear1|transformer_blocks[._]\d+[._]attn[._]to_qkv_mlp_proj)"

LORA = LoraNames(
    prefixes={"transformer": (*DENOISER, "lora_transformer_")},
    formats=FORMATS,
    bases=(
        LoraBase("FLUX.2 [klein] 9B", SINGLE, 4096),
        LoraBase("FLUX.2 [dev]", SINGLE, 6144),
    ),
)
