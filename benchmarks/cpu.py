"""Times networks on the CPU against diffusers and transformers, in float32, in one run.

Both compute with the same random weights, the same inputs and the same number of threads, one after
the other in turn; compiling is not counted. Shown are the shortest and the middle time of each,
their ratios, and how far the results are from each other, relative.

    python benchmarks/cpu.py CASE... [--repeat 5] [--json]

The cases have the sizes of the published models, at 512x512 pixels. The lowest level of
SDXL and the encoder of T5-XXL have fewer blocks than published (`--blocks`), so that both copies of
the weights fit in memory.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch

from eqxdiff.checkpoint import load_module, read_table
from eqxdiff.models.unet.config import UNetConfig
from eqxdiff.models.unet.network import AddedConditioning, UNet
from eqxdiff.passes import lay_convolutions
from eqxdiff.tensors import InMemory
from eqxdiff.text import CLIPTextConfig, CLIPTextModel, T5Config, T5Encoder
from eqxdiff.vae import AutoencoderKL, AutoencoderKLConfig


Calls = dict[str, Callable[[], Any]]
GOALS = {"sd21-unet": 0.9, "sdxl-unet": 0.9, "vae-decode": 1.0, "clip-l": 1.0, "t5-xxl": 1.0}
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD21: dict[str, Any] = {
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
    "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": [PLAIN, CROSS, CROSS],
    "projection_class_embeddings_input_dim": 2816,
    "up_block_types": [CROSS_UP, CROSS_UP, PLAIN_UP],
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_L |= {"num_hidden_layers": 12, "vocab_size": 49408, "hidden_act": "quick_gelu"}
T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_heads": 64,
    "d_kv": 64,
    "vocab_size": 32128,
}


def unet_calls(config: Mapping[str, Any]) -> Calls:
    """Returns a step's calls of a UNet, for a prompt and a negative prompt."""
    from diffusers import UNet2DConditionModel

    theirs, arrays = fill(lambda: UNet2DConditionModel(**config))
    own = UNetConfig.parse({"_class_name": "UNet2DConditionModel", **config})
    ours = load(arrays, "unet", lambda: UNet.init(own, key=jax.random.key(0)))
    x, context = normal(2, 64, 64, 4), normal(2, 77, own.cross_attention_dim)
    pooled, ids, added = normal(2, 1280), np.full((2, 6), 512, np.float32), None
    more = {}
    if own.addition_embed_type is not None:
        more = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(ids)}
        added = AddedConditioning(jnp.asarray(pooled), jnp.asarray(ids))
    pixels, prompts = channels_first(x), torch.from_numpy(context)

    @eqx.filter_jit
    def step(model, x, context, added):
        return jax.vmap(lambda *inputs: model(inputs[0], jnp.float32(500), *inputs[1:]))(
            x, context, added
        )

    pixels_last, hidden = jnp.asarray(x), jnp.asarray(context)
    keys = eqx.filter_jit(lambda model, hidden: jax.vmap(model.keys)(hidden))(ours, hidden)
    laid = lay_convolutions(ours)
    rest = laid.without_keys()
    return {
        "torch": lambda: channels_last(theirs(pixels, 500, prompts, added_cond_kwargs=more).sample),
        "eqxdiff": lambda: step(ours, pixels_last, hidden, added),
        "... convolutions laid": lambda: step(laid, pixels_last, hidden, added),
        "... and prompt's keys ahead": lambda: step(rest, pixels_last, keys, added),
    }


def vae_calls() -> Calls:
    from diffusers import AutoencoderKL as Theirs

    theirs, arrays = fill(lambda: Theirs(**VAE))
    config = AutoencoderKLConfig.parse({"_class_name": "AutoencoderKL", **VAE})
    ours = load(arrays, "vae", lambda: AutoencoderKL.init(config, key=jax.random.key(0)))
    z = normal(64, 64, 4)
    decode = eqx.filter_jit(lambda model, z: model.decode(z)[None])
    latent, theirs_z = jnp.asarray(z), channels_first(z[None]) / config.scaling_factor
    plain = lambda model: lambda: decode(model, latent)
    return {
        "torch": lambda: channels_last(theirs.decode(theirs_z).sample),
        "eqxdiff": plain(ours),
        "... convolutions laid": plain(lay_convolutions(ours)),
    }


def clip_calls() -> Calls:
    from transformers import CLIPTextConfig as TheirConfig, CLIPTextModel as Theirs

    theirs, arrays = fill(lambda: Theirs(TheirConfig(**CLIP_L)))
    config = CLIPTextConfig.parse(CLIP_L)
    ours = load(arrays, "clip", lambda: CLIPTextModel.init(config, key=jax.random.key(0)))
    ids = np.random.default_rng(0).integers(0, 49407, 77, np.int32)
    encode = eqx.filter_jit(lambda model, ids: model(ids).last_hidden_state[None])
    ours_ids, theirs_ids = jnp.asarray(ids), torch.from_numpy(ids)[None].long()
    return {
        "torch": lambda: theirs(theirs_ids).last_hidden_state.numpy(),
        "eqxdiff": lambda: encode(ours, ours_ids),
    }


def t5_calls(blocks: int) -> Calls:
    from transformers import T5Config as TheirConfig, T5EncoderModel as Theirs

    fields = {**T5_XXL, "num_layers": blocks, "feed_forward_proj": "gated-gelu"}
    theirs, arrays = fill(lambda: Theirs(TheirConfig(**fields)))
    config = T5Config.parse(fields)
    ours = load(arrays, "t5", lambda: T5Encoder.init(config, key=jax.random.key(0)))
    ids = np.random.default_rng(0).integers(0, 32000, 512, np.int32)
    encode = eqx.filter_jit(lambda model, ids: model(ids)[None])
    ours_ids, theirs_ids = jnp.asarray(ids), torch.from_numpy(ids)[None].long()
    return {
        "torch": lambda: theirs(theirs_ids).last_hidden_state.numpy(),
        "eqxdiff": lambda: encode(ours, ours_ids),
    }


def fill(make: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """Makes a module of PyTorch with random weights that keep the size of what flows through."""
    with torch.device("meta"):
        module = make().eval()
    noise, arrays = normal(1 << 20), {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            arrays[name] = np.arange(value.numel()).reshape(value.shape)
            continue
        scale = 0.02 if value.ndim < 2 else value[0].numel() ** -0.5
        scaled = noise * np.float32(scale) + np.float32(value.ndim < 2 and "bias" not in name)
        array = np.empty(value.shape, np.float32)
        for start in range(0, array.size, noise.size):
            part = array.reshape(-1)[start : start + noise.size]
            part[:] = scaled[: part.size]
        arrays[name] = array
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    module.load_state_dict(tensors, assign=True)
    for owner in module.modules():  # the buffers that no checkpoint holds count positions
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(owner, name, torch.arange(buffer.numel()).reshape(buffer.shape))
    return module, arrays


def load(arrays: Mapping[str, np.ndarray], table: str, make: Callable[[], Any]) -> Any:
    return load_module(InMemory(arrays), read_table(table), eqx.filter_eval_shape(make))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def measure(calls: Calls, repeat: int) -> dict[str, Any]:
    """Runs all calls once, and then in turn."""
    wanted, times, error = calls["torch"](), {name: [] for name in calls}, {}
    for name, call in calls.items():  # compiles
        error[name] = float(np.linalg.norm(np.asarray(call()) - wanted) / np.linalg.norm(wanted))
    for _ in range(repeat):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    least, middle = ({n: f(t) for n, t in times.items()} for f in (min, statistics.median))
    return {
        name: {
            "ms_min": 1e3 * least[name],
            "ms_median": 1e3 * middle[name],
            "ratio_min": least[name] / least["torch"],
            "ratio_median": middle[name] / middle["torch"],
            "relative_difference": error[name],
        }
        for name in calls
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=2, help="Blocks of SDXL's lowest level, T5.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    depth = {"transformer_layers_per_block": [1, 2, args.blocks]}
    makers = {
        "sd21-unet": lambda: unet_calls(SD21),
        "sdxl-unet": lambda: unet_calls({**SDXL, **depth}),
        "vae-decode": vae_calls,
        "clip-l": clip_calls,
        "t5-xxl": lambda: t5_calls(args.blocks),
    }
    results = {case: measure(makers[case](), args.repeat) for case in args.cases}
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for case, rows in results.items():
        print(f"{case} (goal {GOALS[case]})")
        for name, row in rows.items():
            print(
                f"  {name:32}{row['ms_min']:9.1f} ms {row['ms_median']:9.1f} ms  "
                f"{row['ratio_min']:.2f} {row['ratio_median']:.2f}  "
                f"{row['relative_difference']:.1e}"
            )


if __name__ == "__main__":
    main()
