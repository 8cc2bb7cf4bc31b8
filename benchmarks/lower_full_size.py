"""Lowers one step of FLUX.1 [dev] at full size and 1024x1024: seconds of tracing, no weights.

    python benchmarks/lower_full_size.py [--json]

The goal is 10 s on a CPU: 57 blocks are two scans, whatever their number.
"""

import argparse
import json
import time

import equinox as eqx
import jax
import jax.numpy as jnp

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


def lower() -> dict[str, float]:
    """Times the shapes, the lowering, and counts parameters and the size of the program."""
    config = TransformerConfig(guidance_embeds=True)
    began = time.perf_counter()
    model = eqx.filter_eval_shape(
        lambda: Transformer.init(config, key=jax.random.key(0), dtype=jnp.bfloat16)
    )
    shaped = time.perf_counter()
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    condition = FluxCondition(array(512, 4096), array(768))
    schedule, solver = flow_schedule(28), Euler()
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    weights, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def run(weights, x, condition, scale, index):
        transformer, dtype = eqx.combine(weights, static), jnp.dtype(jnp.bfloat16)
        network = FluxPredictor(transformer, FluxShared(scale), dtype)
        denoiser = GuidedDenoiser(network, stack_conditions(condition), Unguided(), Flow())
        return step(denoiser, x, State(None, None), schedule, index, solver)[0]

    x = jax.ShapeDtypeStruct((128, 128, 16), jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(run).lower(weights, x, condition, scalar, index)
    done = time.perf_counter()
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "shapes_s": round(shaped - began, 2),
        "lowering_s": round(done - shaped, 2),
        "program_kB": round(len(lowered.as_text()) / 1000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    result = lower()
    if parser.parse_args().json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:12} {value:,}")


if __name__ == "__main__":
    main()
