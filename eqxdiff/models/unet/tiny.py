"""The configs of the tiny random checkpoints of all families around a UNet."""

from collections.abc import Mapping
from typing import Any


NOISE: Mapping[str, Any] = {
    "_diffusers_version": "0.30.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
}
"""What all published schedulers agree on."""

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

UNET: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.30.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 32],
    "center_input_sample": False,
    "cross_attention_dim": 32,
    "down_block_types": [CROSS, CROSS, PLAIN],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
"""Three levels, for prompts of 32 features."""

VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.30.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""Four levels and four latent channels."""

CONTROLNET: Mapping[str, Any] = {
    **{
        name: value
        for name, value in UNET.items()
        if name not in ("up_block_types", "out_channels")
    },
    "_class_name": "ControlNetModel",
    "conditioning_embedding_out_channels": [4, 4, 6, 8],
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
"""For that UNet; `{**CONTROLNET, **own}` takes what a family's own UNet has besides."""
