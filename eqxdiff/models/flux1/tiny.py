import json
from collections.abc import Mapping
from typing import Any

from ...text import tiny


def files(*, guidance_embeds: bool) -> Mapping[str, str]:
    """The texts of a tiny FLUX.1 checkpoint, by path: all parts, few features."""
    configs = _configs(guidance_embeds)
    return {
        **{path: json.dumps(config, indent=2) for path, config in configs.items()},
        **{f"tokenizer/{name}": text for name, text in tiny.clip_files().items()},
        **{f"tokenizer_2/{name}": text for name, text in tiny.t5_files().items()},
    }


def _configs(guidance_embeds: bool) -> Mapping[str, Mapping[str, Any]]:
    return {
        "model_index.json": {
            "_class_name": "FluxPipeline",
            "_diffusers_version": "0.30.0.dev0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.30.0.dev0",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 3.0 if guidance_embeds else 1.0,
            "use_dynamic_shifting": guidance_embeds,
        },
        "text_encoder/config.json": tiny.clip_config(torch_dtype="bfloat16"),
        "text_encoder_2/config.json": {
            "architectures": ["T5EncoderModel"],
            "classifier_dropout": 0.0,
            "d_ff": 64,
            "d_kv": 8,
            "d_model": 32,
            "decoder_start_token_id": 0,
            "dense_act_fn": "gelu_new",
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "is_gated_act": True,
            "layer_norm_epsilon": 1e-06,
            "model_type": "t5",
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_layers": 2,
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.3",
            "use_cache": True,
            "vocab_size": 384,
        },
        "transformer/config.json": {
            "_class_name": "FluxTransformer2DModel",
            "_diffusers_version": "0.30.0.dev0",
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 6, 6],
            "guidance_embeds": guidance_embeds,
            "in_channels": 16,
            "joint_attention_dim": 32,
            "num_attention_heads": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 1,
            "pooled_projection_dim": 32,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.30.0.dev0",
            "act_fn": "silu",
            "block_out_channels": [8, 16, 16, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "force_upcast": True,
            "in_channels": 3,
            "latent_channels": 4,
            "latents_mean": None,
            "latents_std": None,
            "layers_per_block": 1,
            "mid_block_add_attention": True,
            "norm_num_groups": 4,
            "out_channels": 3,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
    }
