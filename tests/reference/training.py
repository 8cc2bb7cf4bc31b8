"""Records a training step of FLUX.1 in diffusers: python tests/reference/training.py"""

import numpy as np
import torch
from _torch import FIXTURES, fill
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging


CONFIG = {
    "attention_head_dim": 8,
    "axes_dims_rope": [2, 2, 4],
    "guidance_embeds": False,
    "in_channels": 8,
    "joint_attention_dim": 12,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_single_layers": 2,
    "pooled_projection_dim": 10,
}
BATCH, CHANNELS, HEIGHT, WIDTH, TOKENS = 3, 2, 4, 6, 5


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(5)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "x0": normal(BATCH, CHANNELS, HEIGHT, WIDTH),
        "noise": normal(BATCH, CHANNELS, HEIGHT, WIDTH),
        "txt": normal(BATCH, TOKENS, CONFIG["joint_attention_dim"]),
        "pooled": normal(BATCH, CONFIG["pooled_projection_dim"]),
        "sigma": np.float32([0.15, 0.5, 0.9]),
    }


def step(model, x: dict[str, np.ndarray], dtype) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of rectified flow and its gradients, as diffusers' training scripts compute them."""
    model = model.to(dtype).requires_grad_(True)
    tensor = {name: torch.from_numpy(value).to(dtype) for name, value in x.items()}
    sigma = tensor["sigma"].reshape(-1, 1, 1, 1)
    noisy = (1 - sigma) * tensor["x0"] + sigma * tensor["noise"]
    pack = lambda z: FluxPipeline._pack_latents(z, BATCH, CHANNELS, HEIGHT, WIDTH)
    ids = FluxPipeline._prepare_latent_image_ids(BATCH, HEIGHT // 2, WIDTH // 2, "cpu", dtype)
    out = model(
        hidden_states=pack(noisy),
        encoder_hidden_states=tensor["txt"],
        pooled_projections=tensor["pooled"],
        timestep=tensor["sigma"],
        img_ids=ids,
        txt_ids=torch.zeros(TOKENS, 3, dtype=dtype),
    ).sample
    loss = torch.mean((out - pack(tensor["noise"] - tensor["x0"])) ** 2)
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.double().numpy() for name, p in model.named_parameters()}


def main() -> None:
    logging.set_verbosity_error()
    x = inputs()
    model = fill(FluxTransformer2DModel(**CONFIG))
    loss, grads = step(model, x, torch.float32)
    loss64, grads64 = step(fill(model), x, torch.float64)
    error = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    record = {**x, "loss": np.float64(loss64)}
    record |= {f"grad/{name}": value.astype(np.float32) for name, value in grads64.items()}
    record |= {f"rounding/{name}": error(grads[name], grads64[name]) for name in grads}
    np.savez_compressed(FIXTURES / "training.npz", **record)
    print(loss, loss64, max(record[f"rounding/{name}"] for name in grads))


if __name__ == "__main__":
    main()
