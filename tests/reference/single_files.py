"""Records what diffusers makes of original single files: python tests/reference/single_files.py

Each tensor of the file is its `fake_tensor`; recorded are the file's names and shapes and, of each
tensor that diffusers converts it to, a hash of its float32 bytes.
"""

import hashlib
import inspect
import json
from collections.abc import Sequence

import torch
from _torch import FIXTURES, write_manifest
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from helpers import fake_tensor


SIZES = DIM, HEAD, TEXT, POOLED, CHANNELS, DOUBLE, SINGLE = 32, 16, 24, 20, 16, 2, 3
DEV_SIZES = 3072, 128, 4096, 768, 64, 19, 38
WIDTHS = [8, 16, 24, 32]


def flux(
    dim: int, head: int, text: int, pooled: int, channels: int, double: int, single: int
) -> dict[str, tuple[int, ...]]:
    """The layout of https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbbcdf4f2d2a3ca8f0a9a5a7/src/flux/model.py"""
    shapes = {}

    def linear(name: str, out: int, inner: int) -> None:
        shapes.update({f"{name}.weight": (out, inner), f"{name}.bias": (out,)})

    def norms(name: str) -> None:
        shapes.update({f"{name}.query_norm.scale": (head,), f"{name}.key_norm.scale": (head,)})

    linear("img_in", dim, channels)
    linear("txt_in", dim, text)
    for name, width in (("time_in", 256), ("vector_in", pooled), ("guidance_in", 256)):
        linear(f"{name}.in_layer", dim, width)
        linear(f"{name}.out_layer", dim, dim)
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * dim, dim)
            linear(f"{block}_attn.qkv", 3 * dim, dim)
            norms(f"{block}_attn.norm")
            linear(f"{block}_attn.proj", dim, dim)
            linear(f"{block}_mlp.0", 4 * dim, dim)
            linear(f"{block}_mlp.2", dim, 4 * dim)
    for i in range(single):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", 3 * dim, dim)
        linear(f"{block}.linear1", 7 * dim, dim)
        linear(f"{block}.linear2", dim, 5 * dim)
        norms(f"{block}.norm")
    linear("final_layer.adaLN_modulation.1", 2 * dim, dim)
    linear("final_layer.linear", channels, dim)
    return shapes


def autoencoder(
    widths: Sequence[int] = WIDTHS, latent: int = 4, *, quant: bool = True
) -> dict[str, tuple[int, ...]]:
    """The layout of https://github.com/CompVis/latent-diffusion/blob/a506df5756472e2ebaf9078affdde2c4f1502cd4/ldm/modules/diffusionmodules/model.py"""
    shapes = {}

    def conv(name: str, out: int, inner: int, size: int = 3) -> None:
        shapes.update({f"{name}.weight": (out, inner, size, size), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def resnet(name: str, inner: int, out: int) -> None:
        norm(f"{name}.norm1", inner)
        conv(f"{name}.conv1", out, inner)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if inner != out:
            conv(f"{name}.nin_shortcut", out, inner, 1)

    def middle(name: str) -> None:
        resnet(f"{name}.block_1", widths[-1], widths[-1])
        norm(f"{name}.attn_1.norm", widths[-1])
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", widths[-1], widths[-1], 1)
        resnet(f"{name}.block_2", widths[-1], widths[-1])

    conv("encoder.conv_in", widths[0], 3)
    conv("decoder.conv_in", widths[-1], latent)
    inner = widths[0]
    for i, width in enumerate(widths):
        for j in range(2):
            resnet(f"encoder.down.{i}.block.{j}", inner if j == 0 else width, width)
        inner = width
        if i < len(widths) - 1:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    for i, width in reversed(list(enumerate(widths))):
        for j in range(3):
            resnet(f"decoder.up.{i}.block.{j}", inner if j == 0 else width, width)
        inner = width
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    for side, width in (("encoder", widths[-1]), ("decoder", widths[0])):
        middle(f"{side}.mid")
        norm(f"{side}.norm_out", width)
    conv("encoder.conv_out", 2 * latent, widths[-1])
    conv("decoder.conv_out", 3, widths[0])
    if quant:
        conv("quant_conv", 2 * latent, 2 * latent, 1)
        conv("post_quant_conv", latent, latent, 1)
    return shapes


def fake_file(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(fake_tensor(name, shape)) for name, shape in shapes.items()}


def convert_flux(file: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By diffusers' own converter, whose only fixed size is the width of the blocks."""
    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(convert)
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {DIM}"), scope)
    return scope[convert.__name__](file)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def main() -> None:
    write_manifest("flux1_dev_bfl", flux(*DEV_SIZES))
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            attention_head_dim=HEAD,
            axes_dims_rope=(4, 6, 6),
            in_channels=CHANNELS,
            joint_attention_dim=TEXT,
            num_attention_heads=DIM // HEAD,
            num_layers=DOUBLE,
            num_single_layers=SINGLE,
            pooled_projection_dim=POOLED,
            guidance_embeds=True,
        )
        levels = len(WIDTHS)
        config = {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
        vae = AutoencoderKL(
            **config, block_out_channels=WIDTHS, layers_per_block=2, norm_num_groups=4
        )
    convert_vae = lambda file: single_file_utils.convert_ldm_vae_checkpoint(file, config)
    record = {}
    for name, shapes, convert, model in (
        ("flux1_transformer_bfl", flux(*SIZES), convert_flux, transformer),
        ("vae_ldm", autoencoder(), convert_vae, vae),
    ):
        converted = convert(fake_file(shapes))
        wanted = {tensor: value.shape for tensor, value in model.state_dict().items()}
        assert {tensor: value.shape for tensor, value in converted.items()} == wanted
        record[name] = {
            "file": shapes,
            "diffusers": {tensor: digest(value) for tensor, value in converted.items()},
        }
    (FIXTURES / "single_files.json").write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()
