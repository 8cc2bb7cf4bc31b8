from .._lora import DENOISER, LoraBase, LoraFormat, LoraNames


FORMATS = (
    LoraFormat(
        "cut-names",
        r"(?:^|\.)sformer_blocks\.\d+\.",
        ((r"(^|\.)sformer_blocks\.", r"\1transformer_blocks."),),
    ),
)

FUSED = r"single_transformer_blocks[._]\d+[._]attn[._]to_qkv_mlp_proj"
BLOCKS = r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d+[._]"

LORA = LoraNames(
    prefixes={"transformer": (*DENOISER, "lora_transformer_")},
    formats=FORMATS,
    bases=(
        LoraBase("FLUX.2 [klein] 4B", FUSED, 3072),
        LoraBase("FLUX.2 [klein] 9B", BLOCKS, 4096),
        LoraBase("FLUX.2 [dev]", BLOCKS, 6144),
        LoraBase("a model like FLUX.2", FUSED),
    ),
)
