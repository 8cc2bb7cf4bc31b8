"""Times one FLUX step on the CPU against the transformer of diffusers, in the same run.

    python benchmarks/cpu_flux.py [--json]

Float32, width 1024, 4 double and 8 single blocks, 1024 image and 256 text tokens. Ours is timed
with each saving off and on. The goal is 0.8 of torch's time or less.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp

from eqxdiff import passes
from eqxdiff.models.flux1 import FluxCondition, Transformer, TransformerConfig
from eqxdiff.models.flux1.conditioning import FluxShared
from eqxdiff.models.flux1.predictor import FluxPredictor
from eqxdiff.sampling import (
    Euler,
    Flow,
    GuidedDenoiser,
    State,
    Unguided,
    flow_schedule,
    stack_conditions,
    step,
)


SIZES = {
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "guidance_embeds": True,
}
TEXT, SIDE = 256, 64
REPEATS = 5


def ours() -> Mapping[str, Callable[[], object]]:
    """Returns our step, compiled, in its forms."""
    config = TransformerConfig(**SIZES)
    plain = eqx.filter_jit(Transformer.init)(config, key=jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    condition = FluxCondition(
        jax.random.normal(keys[0], (TEXT, config.joint_attention_dim)),
        jax.random.normal(keys[1], (config.pooled_projection_dim,)),
    )
    x = jax.random.normal(keys[2], (SIDE, SIDE, 16))
    schedule, solver = flow_schedule(20), Euler()

    @eqx.filter_jit
    def run(denoiser, x, index):
        return step(denoiser, x, State(None, None), schedule, index, solver)[0]

    @eqx.filter_jit
    def prepare(denoiser):
        return denoiser.ahead(x, schedule)

    forms = {}
    for order in ("pairs", "halves"):
        transformer = passes.reorder_rope(plain, order)
        network = FluxPredictor(transformer, FluxShared(jnp.float32(3.5)), jnp.dtype("float32"))
        denoiser = GuidedDenoiser(network, stack_conditions(condition), Unguided(), Flow())
        forms[f"{order}, modulation ahead"] = prepare(denoiser)
        if order == "pairs":
            forms["pairs, all in the step"] = denoiser
    index = jnp.asarray(3)
    call = lambda denoiser: run(denoiser, x, index).block_until_ready()
    calls = {name: functools.partial(call, denoiser) for name, denoiser in forms.items()}
    for first in calls.values():
        first()
    return calls


def theirs() -> Callable[[], object]:
    """Returns a call of diffusers' transformer."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**SIZES).eval()
    tokens = (SIDE // 2) ** 2
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.randint(0, SIDE // 2, (tokens, 3)).float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }

    def call():
        with torch.no_grad():
            return model(**inputs, return_dict=False)

    call()
    return call


def measure(calls: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Returns the shortest time of each call in milliseconds, all in turn."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    return best


def flux_step() -> dict[str, float]:
    """Returns milliseconds of each form and of torch, and the ratio of the fastest of ours."""
    calls = {**ours(), "torch": theirs()}
    best = measure(calls)
    ratio = best["halves, modulation ahead"] / best["torch"]
    return {**{name: round(ms, 1) for name, ms in best.items()}, "ratio": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    result = flux_step()
    if parser.parse_args().json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:28} {value:10}")


if __name__ == "__main__":
    main()
