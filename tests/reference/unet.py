"""Records what the UNets and ControlNets of diffusers compute: python tests/reference/unet.py"""

import json
import re

import numpy as np
import torch
from _torch import FIXTURES, fill, write_manifest
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging


def blocks(types: str) -> dict:
    """A letter a level, from the image on: C with attention, P without."""
    down = [{"C": "CrossAttnDownBlock2D", "P": "DownBlock2D"}[letter] for letter in types]
    return {
        "down_block_types": down,
        "up_block_types": [n.replace("Down", "Up") for n in down[::-1]],
    }


CONFIGS = {
    "sd1": {
        **blocks("CCP"),
        "attention_head_dim": 4,
        "block_out_channels": [16, 24, 32],
        "cross_attention_dim": 20,
        "norm_num_groups": 4,
    },
    "sd2": {
        **blocks("CCP"),
        "attention_head_dim": [2, 3, 4],
        "block_out_channels": [16, 24, 32],
        "cross_attention_dim": 20,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl": {
        **blocks("PCC"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "attention_head_dim": [2, 3, 4],
        "block_out_channels": [16, 24, 32],
        "cross_attention_dim": 20,
        "norm_num_groups": 4,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
    },
    "lcm": {
        **blocks("CP"),
        "attention_head_dim": 2,
        "block_out_channels": [16, 24],
        "cross_attention_dim": 20,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "time_cond_proj_dim": 10,
    },
}
CONTROL = {"conditioning_embedding_out_channels": [4, 6, 8]}
SIZES = {"square": (8, 8), "odd": (7, 10)}
TIME_IDS = (1024.0, 768.0, 64.0, 32.0, 960.0, 704.0)
SCALES = {"edges": 0.7, "depth": 1.2}


def draw(config: dict, h: int, w: int, seed: int) -> dict[str, np.ndarray]:
    """Channels last, as we take them."""
    rng = np.random.RandomState(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    inputs = {"x": normal(h, w, 4), "context": normal(5, 20)}
    inputs["timestep"] = np.float32(rng.randint(1, 999))
    if "addition_embed_type" in config:
        inputs["text_embeds"] = normal(12)
        inputs["time_ids"] = np.array(TIME_IDS, np.float32)
    if "time_cond_proj_dim" in config:
        inputs["guidance"] = np.float32(7.5)
    return inputs


def arguments(inputs: dict[str, np.ndarray], dtype: torch.dtype) -> dict:
    """What both kinds of model take."""
    tensor = lambda name: torch.from_numpy(inputs[name]).to(dtype)[None]
    given = {
        "sample": tensor("x").permute(0, 3, 1, 2),
        "timestep": torch.tensor(float(inputs["timestep"])),
        "encoder_hidden_states": tensor("context"),
    }
    if "time_ids" in inputs:
        ids = torch.from_numpy(inputs["time_ids"])[None]
        given["added_cond_kwargs"] = {"text_embeds": tensor("text_embeds"), "time_ids": ids}
    return given


def image(tensor: torch.Tensor) -> np.ndarray:
    return tensor[0].permute(1, 2, 0).double().numpy()


def run(config: dict, inputs: dict, dtype: torch.dtype, control=None) -> np.ndarray:
    model = fill(UNet2DConditionModel(**config)).to(dtype)
    given = arguments(inputs, dtype)
    if "guidance" in inputs:
        embed = StableDiffusionPipeline.get_guidance_scale_embedding
        scale = torch.tensor([float(inputs["guidance"]) - 1])
        given["timestep_cond"] = embed(None, scale, config["time_cond_proj_dim"]).to(dtype)
    if control is not None:
        given["down_block_additional_residuals"] = control[:-1]
        given["mid_block_additional_residual"] = control[-1]
    return image(model(**given).sample)


def run_control(config: dict, name: str, inputs: dict, dtype: torch.dtype, guess: bool) -> list:
    """The residuals of one ControlNet, that of the middle last."""
    shared = {key: value for key, value in config.items() if key != "up_block_types"}
    order = "bgr" if name == "depth" else "rgb"
    model = ControlNetModel(**shared, **CONTROL, controlnet_conditioning_channel_order=order)
    model = fill(model, prefix=f"{name}.")
    # Else the picture would hardly count beside the biases.
    fill(model.controlnet_cond_embedding, 3.0, f"{name}.controlnet_cond_embedding.")
    model = model.to(dtype)
    picture = torch.from_numpy(inputs[f"image/{name}"]).to(dtype).permute(2, 0, 1)[None]
    down, mid = model(
        **arguments(inputs, dtype),
        controlnet_cond=picture,
        conditioning_scale=SCALES[name],
        guess_mode=guess,
        return_dict=False,
    )
    return [*down, mid]


def difference(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def run_norms(config: dict) -> dict[str, np.ndarray]:
    """Every norm on an input of such low variance that its epsilon shows."""
    x = 1e-3 * np.random.RandomState(7).standard_normal((2, 80)).astype(np.float32)
    record = {"x": x}
    for name, module in fill(UNet2DConditionModel(**config)).named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            y = module(torch.from_numpy(x[:, : module.num_channels].T.copy())[None])
            record[name] = y[0].T.numpy()
        elif isinstance(module, torch.nn.LayerNorm):
            record[name] = module(torch.from_numpy(x[:, : module.normalized_shape[0]])).numpy()
    return record


def record_both(record: dict, name: str, make) -> None:
    """The float32 run and its distance from the float64 run."""
    single, double = make(torch.float32), make(torch.float64)
    record[name] = single.astype(np.float32)
    record[f"{name}/rounding"] = np.array(difference(single, double))
    print(name, f"rounds by {difference(single, double):.1e}")


def record_unets() -> None:
    record = {}
    for kind, config in CONFIGS.items():
        record[f"{kind}/config"] = np.array(json.dumps(config))
        for seed, (size, (h, w)) in enumerate(SIZES.items()):
            inputs = draw(config, h, w, seed)
            record |= {f"{kind}/{size}/inputs/{name}": x for name, x in inputs.items()}
            make = lambda dtype, c=config, i=inputs: run(c, i, dtype)
            record_both(record, f"{kind}/{size}/out", make)
        if kind in ("sd1", "sdxl"):
            record |= {f"{kind}/norms/{name}": value for name, value in run_norms(config).items()}
        if kind != "lcm":
            errors = []
            for seed in range(32):
                inputs = draw(config, 8, 8, 100 + seed)
                half, single = (run(config, inputs, d) for d in (torch.bfloat16, torch.float32))
                errors.append(difference(half, single))
            record[f"{kind}/bfloat16"] = np.array(errors)
            print(kind, f"errs in bfloat16 by {np.median(errors):.4f}")
    np.savez_compressed(FIXTURES / "unet.npz", **record)


def record_controlnets() -> None:
    """One alone, in both modes, and what the UNet makes of one and of two."""
    record = {}
    for kind in ("sd1", "sd2", "sdxl"):
        config = CONFIGS[kind]
        shared = {key: value for key, value in config.items() if key != "up_block_types"}
        record[f"{kind}/config"] = np.array(json.dumps({**shared, **CONTROL}))
        record[f"{kind}/unet"] = np.array(json.dumps(config))
        inputs = draw(config, 6, 8, 3)
        rng = np.random.RandomState(4)
        for name in SCALES:
            coarse = rng.randint(0, 2, (6, 8, 3)).astype(np.float32)  # fine noise averages out
            inputs[f"image/{name}"] = np.kron(coarse, np.ones((4, 4, 1), np.float32))
        record |= {f"{kind}/inputs/{name}": value for name, value in inputs.items()}

        for mode, guess in (("plain", False), ("guess", True)):

            def residuals(dtype, config=config, inputs=inputs, guess=guess):
                parts = run_control(config, "edges", inputs, dtype, guess)
                return np.concatenate([image(part).ravel() for part in parts])

            record_both(record, f"{kind}/{mode}/residuals", residuals)

        for names in (("edges",), ("edges", "depth")):

            def out(dtype, config=config, inputs=inputs, names=names):
                every = [run_control(config, name, inputs, dtype, False) for name in names]
                return run(
                    config, inputs, dtype, [sum(parts) for parts in zip(*every, strict=True)]
                )

            record_both(record, f"{kind}/{len(names)}/out", out)
    np.savez_compressed(FIXTURES / "controlnet.npz", **record)


FULL = {
    "sd15": {"cross_attention_dim": 768},
    "sd2": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        **blocks("PCC"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    },
}


def collapse(shapes: dict[str, tuple[int, ...]], list_name: str) -> dict[str, tuple[int, ...]]:
    """Writes what differs in one index as one name with a range, where the indices start at 0."""
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, shape in shapes.items():
        match = re.search(rf"{list_name}\.(\d+)\.", name)
        pattern = name if match is None else name.replace(match[0], f"{list_name}.#.")
        groups.setdefault((pattern, tuple(shape)), []).append(int(match[1]) if match else 0)
    collapsed = {}
    for (pattern, shape), indices in groups.items():
        if indices == list(range(len(indices))) and len(indices) > 1:
            collapsed[pattern.replace("#", f"{{0..{len(indices) - 1}}}")] = shape
        else:
            collapsed |= {pattern.replace("#", str(index)): shape for index in indices}
    return collapsed


def record_manifests() -> None:
    for name, config in FULL.items():
        shared = {key: value for key, value in config.items() if key != "up_block_types"}
        with torch.device("meta"):
            models = {
                "unet": UNet2DConditionModel(**config),
                "controlnet": ControlNetModel(**shared),
            }
        for kind, model in models.items():
            shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
            for list_name in ("transformer_blocks", "attentions", "resnets"):
                shapes = collapse(shapes, list_name)
            write_manifest(f"{kind}_{name}", shapes)


def main() -> None:
    logging.set_verbosity_error()
    record_manifests()
    record_unets()
    record_controlnets()


if __name__ == "__main__":
    main()
