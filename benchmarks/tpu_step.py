"""Compiles denoiser steps for one v6e chip without a TPU and sums their static cycles by kind.

    pip install libtpu==0.0.42.1
    python benchmarks/tpu_step.py [flux] [flux-off] [sampler] [sdxl] [vae] [--kernel MS]

`flux` is the step of FLUX.1 [dev] in bfloat16 at 1024x1024 with 512 text tokens and all passes, and
`flux-off` the same with one pass off at a time. `sampler` compiles the loop of 28 steps. `sdxl` is
the step of SDXL at batch 2 and `vae` the decoder, both at 1024x1024. Static cycles are what the
compiler plans for its own operations, at 1.75 GHz. It plans none for a Pallas kernel: `--kernel` is
the time of one call.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import aot


aot.set_environment()

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from eqxdiff import passes  # noqa: E402
from eqxdiff.kernels import AttentionChoice, attending  # noqa: E402
from eqxdiff.models.flux1 import FluxCondition, Transformer, TransformerConfig  # noqa: E402
from eqxdiff.models.flux1.conditioning import FluxShared  # noqa: E402
from eqxdiff.models.flux1.predictor import FluxPredictor  # noqa: E402
from eqxdiff.models.unet.config import UNetConfig  # noqa: E402
from eqxdiff.models.unet.network import AddedConditioning, UNet  # noqa: E402
from eqxdiff.models.unet.predictor import UNetCondition, UNetPredictor, UNetShared  # noqa: E402
from eqxdiff.nn import AbstractLinear  # noqa: E402
from eqxdiff.sampling import (  # noqa: E402
    ClassifierFree,
    Euler,
    Flow,
    GuidedDenoiser,
    State,
    Unguided,
    flow_schedule,
    sample,
    step,
)
from eqxdiff.vae import AutoencoderKL, AutoencoderKLConfig, decode_latent  # noqa: E402


STEPS = 28
BFLOAT = jnp.dtype(jnp.bfloat16)


def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes(function: Any, *args: Any) -> Any:
    """Returns what a function would return, as shapes."""
    return eqx.filter_eval_shape(function, *args)


class Opaque(AbstractLinear):
    """A layer whose kind `side_by_side` does not know, so that its parts are concatenated."""

    inner: AbstractLinear

    def __call__(self, x: Any) -> Any:
        return self.inner(x)


def flux(*, ahead: bool = True, halves: bool = True, joined: bool = True) -> Any:
    """Returns FLUX.1 [dev]'s denoiser, of shapes, with the passes that are on."""
    config = TransformerConfig(guidance_embeds=True)
    transformer = shapes(
        lambda: Transformer.init(config, key=jax.random.key(0), dtype=jnp.bfloat16)
    )
    bounded = lambda attn: dataclasses.replace(
        attn, bounded=True
    )  # the gains of shapes say nothing
    where = lambda t: (t.transformer_blocks.attn, t.single_transformer_blocks.attn)
    transformer = eqx.tree_at(where, transformer, replace_fn=bounded)
    if halves:
        transformer = shapes(lambda t: passes.reorder_rope(t, "halves"), transformer)
    if not joined:
        where = lambda t: t.single_transformer_blocks.proj_out
        transformer = eqx.tree_at(where, transformer, replace_fn=Opaque)
    network = FluxPredictor(transformer, FluxShared(array(dtype=jnp.float32)), BFLOAT)
    conditions = FluxCondition(array(1, 512, 4096), array(1, 768))
    denoiser = GuidedDenoiser(network, conditions, Unguided(), Flow())
    if not ahead:
        return denoiser
    conditions = shapes(
        lambda d, x: d.ahead(x, flow_schedule(STEPS)).conditions, denoiser, latent()
    )
    return GuidedDenoiser(network.rest(), conditions, denoiser.guider, denoiser.parameterization)


def latent(channels: int = 16) -> Any:
    return array(128, 128, channels, dtype=jnp.float32)


def one_step(denoiser: Any, x: Any, index: Any) -> Any:
    schedule = flow_schedule(STEPS)
    return step(denoiser, x, State(None, None), schedule, index, Euler())[0]


def flux_step(**off: bool) -> aot.Report:
    """Compiles one step of FLUX.1 [dev], with passes off by name."""
    index = array(dtype=jnp.int32)
    return build(one_step, flux(**off), latent(), index)


def flux_sampler() -> aot.Report:
    """Compiles the loop of 28 steps as one program, modulation and all."""
    run = lambda denoiser, x: sample(denoiser, x, flow_schedule(STEPS), Euler())
    return build(run, flux(ahead=False), latent())


def sdxl_step() -> aot.Report:
    """Compiles one step of SDXL, with its prompt and a negative prompt."""
    config = UNetConfig(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    unet = shapes(lambda: UNet.init(config, key=jax.random.key(0), dtype=jnp.bfloat16))
    added = AddedConditioning(array(2, 1280), array(2, 6, dtype=jnp.float32))
    conditions = UNetCondition(array(2, 77, 2048), added, array(2, dtype=jnp.float32))
    network = UNetPredictor(unet, UNetShared(None, None, ()), BFLOAT)
    scale = array(dtype=jnp.float32)
    denoiser = GuidedDenoiser(network, conditions, ClassifierFree(scale), Flow())
    return build(one_step, denoiser, latent(4), array(dtype=jnp.int32))


def vae_decoder() -> aot.Report:
    """Compiles the decoder of FLUX.1's autoencoder for 1024x1024."""
    config = AutoencoderKLConfig(
        block_out_channels=(128, 256, 512, 512),
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    vae = shapes(lambda: AutoencoderKL.init(config, key=jax.random.key(0), dtype=jnp.bfloat16))
    return build(lambda vae, x: decode_latent(vae, x, BFLOAT, tiled=False), vae, latent())


def build(function: Any, *args: Any) -> aot.Report:
    """Compiles with the attention that a v6e chip takes."""
    mesh = aot.one_chip()
    device = mesh.devices.flat[0].device_kind
    choice = AttentionChoice(("pallas_tpu", "chunked"), platform="tpu", device=device)
    with attending(choice):
        return aot.compile_for(mesh, function, *args, options=aot.VMEM)


PROGRAMS = {
    "flux": {"FLUX.1 [dev] step, all passes": flux_step},
    "flux-off": {
        "modulation in every step": functools.partial(flux_step, ahead=False),
        "pairs turned by rope": functools.partial(flux_step, halves=False),
        "attention and MLP concatenated": functools.partial(flux_step, joined=False),
    },
    "sampler": {"FLUX.1 [dev], 28 steps in one program": flux_sampler},
    "sdxl": {"SDXL step, batch 2": sdxl_step},
    "vae": {"VAE decode, 1024x1024": vae_decoder},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="*", default=["flux"], choices=PROGRAMS)
    parser.add_argument("--kernel", type=float, default=0.0, help="Milliseconds of one call.")
    parser.add_argument("--json", type=Path)
    order = parser.parse_args()
    found = {}
    for name, make in ((n, m) for group in order.programs for n, m in PROGRAMS[group].items()):
        report = make()
        found[name] = dataclasses.asdict(report)
        kernels = report.kernels * order.kernel
        gib = [f"{size / 2**30:.2f} GiB" for size in (report.arguments, report.temporary)]
        print(f"{name}: {report.total + kernels:.1f} ms static", flush=True)
        print(f"  of which {report.kernels} calls of kernels {kernels:.1f}, {report.milliseconds}")
        print(f"  arguments {gib[0]}, temporary {gib[1]}, compiled in {report.compile_s} s of CPU")
        for row in report.largest:
            print(f"    {row[0]:7.2f}  {row[1]:16} {row[2]:44} {row[3]}")
    if order.json:
        order.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
