"""Records what the FLUX.1 transformer of diffusers computes: python tests/reference/flux1.py"""

import numpy as np
import torch
from _torch import FIXTURES, fill, write_manifest
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging


CONFIG = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "in_channels": 16,
    "joint_attention_dim": 24,
    "num_attention_heads": 3,
    "num_layers": 2,
    "num_single_layers": 3,
    "pooled_projection_dim": 20,
}
SHAPES = {"square": (1, 4, 4), "wide": (1, 2, 7), "batch": (2, 3, 5)}
TOKENS = 9


def inputs(batch: int, h: int, w: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "img": normal(batch, h * w, CONFIG["in_channels"]),
        "txt": normal(batch, TOKENS, CONFIG["joint_attention_dim"]),
        "pooled": normal(batch, CONFIG["pooled_projection_dim"]),
        "timestep": np.float32(rng.uniform(0.05, 1.0, batch)),
        "guidance": np.float32(rng.uniform(1.0, 6.0, batch)),
    }


def run(model, x: dict[str, np.ndarray], h: int, w: int, dtype) -> np.ndarray:
    tensor = {name: torch.from_numpy(value).to(dtype) for name, value in x.items()}
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).to(dtype)
    embeds = model.config.guidance_embeds
    out = model.to(dtype)(
        hidden_states=tensor["img"],
        encoder_hidden_states=tensor["txt"],
        pooled_projections=tensor["pooled"],
        timestep=tensor["timestep"],
        guidance=tensor["guidance"] if embeds else None,
        img_ids=ids,
        txt_ids=torch.zeros(TOKENS, 3, dtype=dtype),
    )
    return out.sample.double().numpy()


def run_norms(model) -> dict[str, np.ndarray]:
    """The norms on inputs of such low variance that their epsilons show."""
    rng = np.random.RandomState(7)
    x = np.float32(1e-3 * rng.standard_normal((5, 48)))
    heads = np.float32(1e-3 * rng.standard_normal((5, 3, 16)))
    vec = np.float32(rng.standard_normal(48))
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    img, emb, qk = torch.from_numpy(x)[None], torch.from_numpy(vec)[None], torch.from_numpy(heads)
    return {
        "x": x,
        "heads": heads,
        "vec": vec,
        "norm1": double.norm1(img, emb=emb)[0][0].numpy(),
        "norm": single.norm(img, emb=emb)[0][0].numpy(),
        "norm_out": model.norm_out(img, emb)[0].numpy(),
        "norm_q": double.attn.norm_q(qk).numpy(),
        "norm_added_k": double.attn.norm_added_k(qk).numpy(),
        "single_norm_k": single.attn.norm_k(qk).numpy(),
    }


def main() -> None:
    logging.set_verbosity_error()
    for kind, embeds in (("dev", True), ("schnell", False)):
        with torch.device("meta"):
            state = FluxTransformer2DModel(guidance_embeds=embeds).state_dict()
        write_manifest(f"flux1_{kind}", {name: tensor.shape for name, tensor in state.items()})
    record = {}
    for kind, embeds in (("dev", True), ("schnell", False)):
        model = fill(FluxTransformer2DModel(**CONFIG, guidance_embeds=embeds))
        if kind == "dev":
            record |= {f"norms/{name}": value for name, value in run_norms(model).items()}
        for shape, (batch, h, w) in SHAPES.items():
            x = inputs(batch, h, w, seed=h)
            record |= {f"{shape}/{name}": value for name, value in x.items()}
            single = run(model, x, h, w, torch.float32)
            double = run(model, x, h, w, torch.float64)
            model.to(torch.float32)
            record[f"{kind}/{shape}/out"] = single.astype(np.float32)
            record[f"{kind}/{shape}/rounding"] = np.linalg.norm(single - double) / np.linalg.norm(
                double
            )
        # The error of bfloat16 against the float32 run, for eight inputs. 500 and 4000 are
        # exact in bfloat16, so that the rounding of the timestep itself does not hide the rest.
        errors = []
        for seed in range(8):
            x = inputs(1, 4, 4, seed=100 + seed)
            x |= {"timestep": np.float32([0.5]), "guidance": np.float32([4.0])}
            record |= {f"bfloat16/{seed}/{name}": value for name, value in x.items()}
            single = run(model, x, 4, 4, torch.float32)
            half = run(model, x, 4, 4, torch.bfloat16)
            fill(model.to(torch.float32))
            errors.append(np.linalg.norm(half - single) / np.linalg.norm(single))
        record[f"{kind}/bfloat16"] = np.array(errors)
    np.savez_compressed(FIXTURES / "flux1.npz", **record)
    for name, value in record.items():
        if "rounding" in name or name.endswith("/bfloat16"):
            print(name, np.median(value))


if __name__ == "__main__":
    main()
