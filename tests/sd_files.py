"""The checkpoints and pictures that the pipelines of Stable Diffusion are compared on."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from helpers import FIXTURES, fake_tensor, write_checkpoint

from eqxdiff.checkpoint import export_infos, read_table
from eqxdiff.models import find_model


CASES = json.loads((FIXTURES / "sd_pipeline.json").read_text())
CONTROLNET = {
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.30.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 32],
    "center_input_sample": False,
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
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
    "sample_size": 8,
    "conditioning_embedding_out_channels": [4, 4, 6, 8],
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
"""For a UNet of three levels and prompts of 32 features."""

OF_CONTROLNETS = (
    *CONTROLNET,
    "addition_embed_type",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "attention_head_dim",
    "projection_class_embeddings_input_dim",
    "transformer_layers_per_block",
    "upcast_attention",
    "use_linear_projection",
)
"""What a ControlNet's config takes over from its UNet's."""


def write_case(folder: Path, case: dict) -> tuple[Path, list[Path]]:
    """The checkpoint of a case, and its ControlNets."""
    model = write_checkpoint(folder / "model", case["model"], case.get("gain", 1.0))
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **case.get("scheduler", {})}))
    names = [f"controlnet_{i}" for i in range(len(case.get("controls", ())))]
    return model, [write_controlnet(folder / name, case["model"]) for name in names]


def write_controlnet(folder: Path, model: str) -> Path:
    """A ControlNet for a tiny UNet, whose numbers depend on its folder's name and their own."""
    family, _ = find_model(model)
    unet = json.loads(family.example(model)["unet/config.json"])
    own = {name: unet[name] for name in unet if name in OF_CONTROLNETS}
    config = {**CONTROLNET, **own, "_class_name": "ControlNetModel"}
    component = family.controlnet
    assert component is not None
    infos = export_infos(component.skeleton(component.parse(config)), read_table(component.table))
    tensors = {
        key: fake_tensor(f"{folder.name}.{key}", info.shape, 3.0 if "cond_embedding" in key else 1)
        for key, info in infos.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"}
    )
    return folder


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Blocks of random colours, (height, width, 3), uint8."""
    rng = np.random.RandomState(seed)
    return np.kron(rng.randint(0, 256, (height // 8, width // 8, 3)), np.ones((8, 8, 1))).astype(
        np.uint8
    )
