"""Times attention at the shapes of the models.

On a CPU against PyTorch's `scaled_dot_product_attention` in the same run, in float32, the two
taking turns; on a GPU every backend, in bfloat16, as TFLOP/s.

    python benchmarks/attention.py [-k WORD] [--rounds 3] [--json FILE]
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqxdiff.kernels import attending, attention, choose_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens, heads and head dimension of one attention of a model."""

    name: str
    queries: int
    keys: int
    heads: int
    dim: int
    batch: int = 1
    key_heads: int | None = None
    bias: bool = False
    causal: bool = False
    card: bool = False  # only on an accelerator


SHAPES = (
    Shape("FLUX, 512 tokens of text", 4608, 4608, 24, 128),
    Shape("FLUX, 256 tokens of text", 4352, 4352, 24, 128),
    Shape("FLUX, smaller", 1280, 1280, 8, 128),
    Shape("SDXL", 4096, 4096, 10, 64),
    Shape("SDXL", 1024, 1024, 20, 64, batch=2),
    Shape("SDXL to the prompt", 4096, 77, 10, 64),
    Shape("SDXL to the prompt", 1024, 77, 20, 64, batch=2),
    Shape("SD2", 9216, 9216, 5, 64),
    Shape("SD2", 2304, 2304, 10, 64),
    Shape("SD2", 576, 576, 20, 64),
    Shape("SD2", 144, 144, 20, 64),
    Shape("SD1.5", 4096, 4096, 8, 40),
    Shape("SD1.5", 1024, 1024, 8, 80),
    Shape("SD1.5", 256, 256, 8, 160),
    Shape("SD1.5", 64, 64, 8, 160),
    Shape("VAE", 4096, 4096, 1, 512),
    Shape("VAE", 16384, 16384, 1, 512, card=True),
    Shape("T5", 256, 256, 64, 64, bias=True),
    Shape("T5", 512, 512, 64, 64, bias=True),
    Shape("CLIP", 77, 77, 12, 64, causal=True),
    Shape("Qwen3", 512, 512, 32, 128, key_heads=8, causal=True),
)


def draw(shape: Shape) -> dict[str, np.ndarray]:
    """Draws the arrays of a shape, as `attention` takes them."""
    numbers, keys = np.random.RandomState(0), (shape.keys, shape.key_heads or shape.heads)
    sizes = {"q": (shape.queries, shape.heads), "k": keys, "v": keys}
    drawn: dict[str, np.ndarray] = {
        name: numbers.standard_normal((shape.batch, *size, shape.dim)).astype(np.float32)
        for name, size in sizes.items()
    }
    whole = shape.heads, shape.queries, shape.keys
    if shape.bias:
        drawn["bias"] = numbers.standard_normal(whole).astype(np.float32)
    if shape.causal:
        drawn["mask"] = np.tri(*whole[1:], dtype=bool)[None]
    return drawn


def ours(drawn: Mapping[str, np.ndarray], name: Any, dtype: Any) -> tuple[Callable, dict]:
    """Returns a call of our attention, and where the backend of the shape is noted."""
    q, k, v = (jnp.asarray(drawn[key], dtype) for key in "qkv")
    others = {key: jnp.asarray(drawn[key]) for key in ("bias", "mask") if key in drawn}
    choice, taken = choose_attention(name, dtype=dtype), {}

    @jax.jit
    def call(q: jax.Array, k: jax.Array, v: jax.Array, others: Any) -> jax.Array:
        with attending(choice) as used:
            implementation = None if name == "auto" else name
            one = functools.partial(attention, **others, implementation=implementation)
            made = jax.vmap(one)(q, k, v)
        taken.update(used)
        return made

    return lambda: jax.block_until_ready(call(q, k, v, others)), taken


def torchs(drawn: Mapping[str, np.ndarray]) -> Callable:
    """Returns a call of PyTorch's attention, on arrays laid out as it likes them."""
    import torch

    q, k, v = (torch.from_numpy(drawn[key]).transpose(1, 2).contiguous() for key in "qkv")
    mask = {"attn_mask": torch.from_numpy(drawn["bias"])} if "bias" in drawn else {}
    mask |= {"is_causal": True} if "mask" in drawn else {}
    mask |= {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **mask)


def best(calls: Mapping[str, Callable], rounds: int) -> dict[str, float]:
    """Returns the least seconds of each call. The calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    first = time.perf_counter()
    for call in calls.values():
        call()
    repeats = max(1, int(0.1 * len(calls) / (time.perf_counter() - first)))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: min(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="time only shapes whose name contains this")
    parser.add_argument("--rounds", type=int, default=3, help="take the best of so many rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    card, found = jax.default_backend() != "cpu", []
    for shape in SHAPES:
        if args.k not in shape.name or (shape.card and not card):
            continue
        drawn, calls = draw(shape), {}
        if not card:
            calls["torch"] = torchs(drawn)
        kernels = ("cudnn", "pallas_gpu") if jax.default_backend() == "gpu" else ("pallas_tpu",)
        for name in ("auto", *((*kernels, "chunked") if card else ())):
            call, taken = ours(drawn, name, jnp.bfloat16 if card else jnp.float32)
            try:
                call()
            except NotImplementedError as error:
                print(f"  {name} refuses: {error}")
            else:
                calls[name if name != "auto" else f"auto: {next(iter(taken.values()))}"] = call
        seconds = best(calls, args.rounds)
        size = shape.batch * shape.heads * shape.queries * shape.keys * shape.dim
        text = f"{shape.name} {shape.batch}x{shape.queries}:{shape.keys}x{shape.heads}x{shape.dim}"
        tera = {name: 4e-12 * size / each for name, each in seconds.items()}
        told = ", ".join(f"{name} {each:.3f} TFLOP/s" for name, each in tera.items())
        row = {"shape": text, "seconds": seconds}
        if not card:
            own = next(each for name, each in seconds.items() if name != "torch")
            row["ratio"] = own / seconds["torch"]
            told = f"{row['ratio']:.2f} of torch's time; {told}"
        print(f"{text}: {told}", flush=True)
        found.append(row)
    if args.json is not None:
        args.json.write_text(json.dumps({"device": jax.devices()[0].device_kind, "rows": found}))


if __name__ == "__main__":
    main()
