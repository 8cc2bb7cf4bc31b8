"""Records what the autoencoder of diffusers computes: python tests/reference/vae.py"""

import json

import numpy as np
import torch
from _torch import FIXTURES, fill, write_manifest
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging


def levels(*channels: int) -> dict:
    return {
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


CONFIGS = {
    "sd": {
        **levels(8, 16, 24),
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.18215,
    },
    "flux": {
        **levels(8, 8, 16, 16),
        "latent_channels": 16,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    "no_attention": {
        **levels(8, 16),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}
SIZES = {"square": (4, 4), "wide": (3, 7)}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def draw(config: dict, h: int, w: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A latent and an image, channels last."""
    rng = np.random.RandomState(seed)
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    latent = rng.standard_normal((h, w, config["latent_channels"])).astype(np.float32)
    return latent, rng.uniform(-1, 1, (scale * h, scale * w, 3)).astype(np.float32)


def run(config: dict, x: np.ndarray, output: str, dtype: torch.dtype) -> np.ndarray:
    """A latent decoded as the pipelines do, or an image encoded."""
    model = fill(AutoencoderKL(**config)).to(dtype)
    tensor = torch.from_numpy(x).to(dtype).permute(2, 0, 1)[None]
    scale, shift = model.config.scaling_factor, model.config.shift_factor or 0.0
    if output == "image":
        result = model.decode(tensor / scale + shift).sample
    else:
        posterior = model.encode(tensor).latent_dist
        normalized = (posterior.mean - shift) * scale
        moments = {"mean": posterior.mean, "logvar": posterior.logvar, "normalized": normalized}
        result = moments[output]
    return result[0].permute(1, 2, 0).double().numpy()


def difference(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def run_norms(config: dict) -> dict[str, np.ndarray]:
    """Every norm on an input of such low variance that its epsilon shows."""
    x = 1e-3 * np.random.RandomState(7).standard_normal((6, max(config["block_out_channels"])))
    x = x.astype(np.float32)
    record = {"x": x}
    for name, module in fill(AutoencoderKL(**config)).named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            y = module(torch.from_numpy(x[:, : module.num_channels].T.copy())[None])
            record[name] = y[0].T.numpy()
    return record


def run_posterior() -> dict[str, np.ndarray]:
    """Mean, log-variance and standard deviation of moments that leave the range allowed."""
    moments = np.linspace(-60, 60, 3 * 4 * 32, dtype=np.float32).reshape(3, 4, 32)
    tensor = torch.from_numpy(moments).permute(2, 0, 1)[None]
    posterior = DiagonalGaussianDistribution(tensor)
    parts = {"mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std}
    record = {name: part[0].permute(1, 2, 0).numpy() for name, part in parts.items()}
    return {"moments": moments, **record}


def record_half(config: dict) -> dict[str, np.ndarray]:
    """The error of bfloat16 against the float32 run, for eight inputs."""
    errors = {"image": [], "mean": []}
    for seed in range(8):
        for output, x in zip(errors, draw(config, 4, 4, 100 + seed), strict=True):
            half, single = (run(config, x, output, d) for d in (torch.bfloat16, torch.float32))
            errors[output].append(difference(half, single))
    return {f"bfloat16/{output}": np.array(values) for output, values in errors.items()}


def record_manifests() -> None:
    """The published files: that of SD has the names that diffusers had then."""
    full = {**levels(128, 256, 512, 512), "layers_per_block": 2}
    with torch.device("meta"):
        sd = AutoencoderKL(**full).state_dict()
        flux = AutoencoderKL(
            **full, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
        ).state_dict()
    old = {}
    for name, tensor in sd.items():
        for new, before in OLD.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor.shape
    write_manifest("vae_sd", old)
    write_manifest("vae_flux", {name: tensor.shape for name, tensor in flux.items()})


def main() -> None:
    logging.set_verbosity_error()
    record_manifests()
    record = {f"posterior/{name}": value for name, value in run_posterior().items()}
    for kind, config in CONFIGS.items():
        record[f"{kind}/config"] = np.array(json.dumps(config))
        for size, (h, w) in SIZES.items():
            latent, image = draw(config, h, w, seed=w)
            inputs = {"image": latent, "mean": image, "logvar": image, "normalized": image}
            for output, x in inputs.items():
                single, double = (run(config, x, output, d) for d in (torch.float32, torch.float64))
                record[f"{kind}/{size}/{output}"] = single.astype(np.float32)
                rounding = difference(single, double)
                record[f"{kind}/{size}/{output}/rounding"] = np.array(rounding)
                print(kind, size, output, f"rounds by {rounding:.1e}")
            record[f"{kind}/{size}/inputs/latent"] = latent
            record[f"{kind}/{size}/inputs/image"] = image
        if kind != "no_attention":
            record |= {f"{kind}/norms/{n}": value for n, value in run_norms(config).items()}
            record |= {f"{kind}/{n}": value for n, value in record_half(config).items()}
            for output in ("image", "mean"):
                errors = record[f"{kind}/bfloat16/{output}"]
                print(kind, output, f"errs in bfloat16 by {np.median(errors):.4f}")
    np.savez_compressed(FIXTURES / "vae.npz", **record)


if __name__ == "__main__":
    main()
