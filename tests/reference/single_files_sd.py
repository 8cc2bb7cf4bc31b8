"""Records what diffusers makes of original single files of Stable Diffusion 1, 2 and XL:
python tests/reference/single_files_sd.py

Each tensor of a file is its `fake_tensor`; recorded are the file's names and shapes and, of each
tensor that diffusers converts it to, a hash of its float32 bytes.
"""

import gzip
import json
from types import SimpleNamespace

import torch
from _torch import FIXTURES, write_manifest
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from single_files import autoencoder, digest, fake_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


Shapes = dict[str, tuple[int, ...]]

KINDS = {
    "sd15": {"widths": (320, 640, 1280, 1280), "depths": (1, 1, 1, 0), "context": 768},
    "sd2": {
        **{"widths": (320, 640, 1280, 1280), "depths": (1, 1, 1, 0), "context": 1024},
        "linear": True,
    },
    "sdxl": {
        **{"widths": (320, 640, 1280), "depths": (0, 2, 10), "context": 2048},
        **{"linear": True, "added": 2816},
    },
    "refiner": {
        **{"widths": (384, 768, 1536, 1536), "depths": (0, 4, 4, 0), "context": 1280},
        **{"linear": True, "added": 2560},
    },
}
TINY = {"context": 20, "added": 52}
TINY_WIDTHS = (8, 16, 16, 24)


class Builder:
    """The layers of https://github.com/Stability-AI/generative-models/blob/fbdc58cab9f4ee2be7a5e1f2e2787ecd9311942f/sgm/modules/diffusionmodules/openaimodel.py"""

    def __init__(self, context: int, linear: bool, temb: int):
        self.shapes: Shapes = {}
        self.context, self.one_pixel, self.temb = context, () if linear else (1, 1), temb

    def conv(self, name: str, out: int, inner: int, size: int = 3) -> None:
        self.shapes |= {f"{name}.weight": (out, inner, size, size), f"{name}.bias": (out,)}

    def linear(self, name: str, out: int, inner: int, *, bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = (out, inner)
        if bias:
            self.shapes[f"{name}.bias"] = (out,)

    def norm(self, name: str, width: int) -> None:
        self.shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def resnet(self, name: str, inner: int, out: int) -> None:
        self.norm(f"{name}.in_layers.0", inner)
        self.conv(f"{name}.in_layers.2", out, inner)
        self.linear(f"{name}.emb_layers.1", out, self.temb)
        self.norm(f"{name}.out_layers.0", out)
        self.conv(f"{name}.out_layers.3", out, out)
        if inner != out:
            self.conv(f"{name}.skip_connection", out, inner, 1)

    def projection(self, name: str, width: int) -> None:
        self.shapes[f"{name}.weight"] = (width, width, *self.one_pixel)
        self.shapes[f"{name}.bias"] = (width,)

    def attention(self, name: str, width: int, depth: int) -> None:
        self.norm(f"{name}.norm", width)
        self.projection(f"{name}.proj_in", width)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            for attn, context in (("attn1", width), ("attn2", self.context)):
                self.linear(f"{block}.{attn}.to_q", width, width, bias=False)
                self.linear(f"{block}.{attn}.to_k", width, context, bias=False)
                self.linear(f"{block}.{attn}.to_v", width, context, bias=False)
                self.linear(f"{block}.{attn}.to_out.0", width, width)
            self.linear(f"{block}.ff.net.0.proj", 8 * width, width)
            self.linear(f"{block}.ff.net.2", width, 4 * width)
            for j in (1, 2, 3):
                self.norm(f"{block}.norm{j}", width)
        self.projection(f"{name}.proj_out", width)

    def down(self, widths: tuple[int, ...], depths: tuple[int, ...]) -> list[int]:
        """The way down and the middle; the widths that the way up takes."""
        self.conv("input_blocks.0.0", widths[0], 4)
        skips, index = [widths[0]], 1
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for _ in range(2):
                self.resnet(f"input_blocks.{index}.0", skips[-1], width)
                if depth:
                    self.attention(f"input_blocks.{index}.1", width, depth)
                skips.append(width)
                index += 1
            if level < len(widths) - 1:
                self.conv(f"input_blocks.{index}.0.op", width, width)
                skips.append(width)
                index += 1
        self.resnet("middle_block.0", widths[-1], widths[-1])
        self.attention("middle_block.1", widths[-1], max(depths[-2:]))
        self.resnet("middle_block.2", widths[-1], widths[-1])
        return skips

    def up(self, widths: tuple[int, ...], depths: tuple[int, ...], skips: list[int]) -> None:
        inner, index, skips = widths[-1], 0, list(skips)
        for level in reversed(range(len(widths))):
            for j in range(3):
                block = f"output_blocks.{index}"
                self.resnet(f"{block}.0", inner + skips.pop(), widths[level])
                inner = widths[level]
                if depths[level]:
                    self.attention(f"{block}.1", inner, depths[level])
                if level and j == 2:
                    self.conv(f"{block}.{2 if depths[level] else 1}.conv", inner, inner)
                index += 1
        self.norm("out.0", widths[0])
        self.conv("out.2", 4, widths[0])


def unet(
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    context: int,
    linear: bool = False,
    added: int | None = None,
    control: bool = False,
) -> Shapes:
    temb = 4 * widths[0]
    build = Builder(context, linear, temb)
    build.linear("time_embed.0", temb, widths[0])
    build.linear("time_embed.2", temb, temb)
    if added is not None:
        build.linear("label_emb.0.0", temb, added)
        build.linear("label_emb.0.2", temb, temb)
    skips = build.down(widths, depths)
    if not control:
        build.up(widths, depths, skips)
        return build.shapes
    # https://github.com/lllyasviel/ControlNet/blob/ed85cd1e25a5ed592f7d8178495b4483de0331bf/cldm/cldm.py
    hint = [3, 16, 16, 32, 32, 96, 96, 256, widths[0]]
    for i in range(8):
        build.conv(f"input_hint_block.{2 * i}", hint[i + 1], hint[i])
    for i, width in enumerate(skips):
        build.conv(f"zero_convs.{i}.0", width, width, 1)
    build.conv("middle_block_out.0", widths[-1], widths[-1], 1)
    return build.shapes


def tiny(kind: str) -> dict:
    sizes = KINDS[kind]
    sizes = {**sizes, **{key: value for key, value in TINY.items() if key in sizes}}
    depths = tuple(min(depth, 2) for depth in sizes["depths"])
    return {**sizes, "widths": TINY_WIDTHS[: len(sizes["widths"])], "depths": depths}


def open_clip(width: int, layers: int, vocabulary: int, projected: int) -> Shapes:
    """The text half of https://github.com/mlfoundations/open_clip/blob/v2.24.0/src/open_clip/model.py"""
    build = Builder(0, True, 0)
    build.shapes |= {"positional_embedding": (77, width), "text_projection": (width, projected)}
    build.shapes |= {"logit_scale": (), "token_embedding.weight": (vocabulary, width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        build.norm(f"{block}.ln_1", width)
        in_proj = {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}
        build.shapes |= {f"{block}.attn.{name}": shape for name, shape in in_proj.items()}
        build.linear(f"{block}.attn.out_proj", width, width)
        build.norm(f"{block}.ln_2", width)
        build.linear(f"{block}.mlp.c_fc", 4 * width, width)
        build.linear(f"{block}.mlp.c_proj", width, 4 * width)
    build.norm("ln_final", width)
    return build.shapes


def unet_config(kind: str) -> dict:
    """Of the tiny UNet."""
    sizes = tiny(kind)
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in sizes["depths"]]
    config = {
        "attention_head_dim": 2,
        "block_out_channels": list(sizes["widths"]),
        "cross_attention_dim": sizes["context"],
        "down_block_types": down,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "transformer_layers_per_block": [max(depth, 1) for depth in sizes["depths"]],
        "use_linear_projection": sizes.get("linear", False),
    }
    if kind == "refiner":
        config["transformer_layers_per_block"] = 2
    if "added" in sizes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": sizes["added"],
        }
    return config


def check(converted: dict, model: torch.nn.Module, names=lambda name: name) -> dict[str, str]:
    """The hash of each tensor, once they are all that the module has."""
    wanted = {names(name): value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in converted.items()} == wanted
    return {name: digest(value)[:8] for name, value in converted.items()}


def record_unet(kind: str) -> dict:
    config, shapes = unet_config(kind), unet(**tiny(kind))
    up = [name.replace("Down", "Up") for name in reversed(config["down_block_types"])]
    with torch.device("meta"):
        model = UNet2DConditionModel(**config, up_block_types=up)
    # the values are made from the names without the prefix
    file = {f"model.diffusion_model.{n}": t for n, t in fake_file(shapes).items()}
    converted = single_file_utils.convert_ldm_unet_checkpoint(file, config)
    return {"config": config, "file": shapes, "diffusers": check(converted, model)}


def record_control() -> dict:
    config, shapes = unet_config("sd15"), unet(**tiny("sd15"), control=True)
    with torch.device("meta"):
        model = ControlNetModel(**config)
    file = {f"control_model.{n}": t for n, t in fake_file(shapes).items()}
    converted = single_file_utils.convert_controlnet_checkpoint(file, config)
    return {"config": config, "file": shapes, "diffusers": check(converted, model)}


def record_clip(width: int, layers: int, kept: int, *, projects: bool) -> dict:
    shapes = open_clip(width, layers, 40, width)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": kept,
        "num_attention_heads": 2,
        "vocab_size": 40,
        "projection_dim": width,
        "hidden_act": "gelu",
    }
    config = CLIPTextConfig(**sizes)
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)
    prefix = "conditioner.embedders.1.model." if projects else "cond_stage_model.model."
    file = {f"{prefix}{name}": tensor for name, tensor in fake_file(shapes).items()}
    stub = SimpleNamespace(config=config)
    converted = single_file_utils.convert_open_clip_checkpoint(stub, file, prefix)
    # transformers has dropped the prefix, and diffusers writes a projection for any encoder
    short = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    if not projects:
        short.pop("text_projection.weight", None)
    strip = lambda name: name.removeprefix("text_model.")
    digests = check(short, model, strip)
    published = lambda name: name if name.startswith("text_") else f"text_model.{name}"
    return {
        "config": {**sizes, "architectures": [type(model).__name__]},
        "file": shapes,
        "diffusers": {published(name): value for name, value in digests.items()},
    }


LAYERS = r".*(?:transformer_blocks|resblocks|zero_convs)"


def main() -> None:
    for kind, sizes in KINDS.items():
        write_manifest(f"unet_{kind}_ldm", unet(**sizes), LAYERS)
    write_manifest("controlnet_sd15_ldm", unet(**KINDS["sd15"], control=True), LAYERS)
    write_manifest("clip_h_openclip", open_clip(1024, 24, 49408, 1024), LAYERS)
    write_manifest("clip_bigg_openclip", open_clip(1280, 32, 49408, 1280), LAYERS)
    for kind, latent in (("sd", 4), ("flux", 16)):
        shapes = autoencoder((128, 256, 512, 512), latent, quant=kind == "sd")
        write_manifest(f"vae_{kind}_ldm", shapes, r".*\.(?:block|down|up)")
    record = {f"unet_{kind}": record_unet(kind) for kind in KINDS}
    record["controlnet"] = record_control()
    record["clip_h"] = record_clip(8, 24, 23, projects=False)
    record["clip_bigg"] = record_clip(8, 3, 3, projects=True)
    text = json.dumps(record, separators=(",", ":"))
    path = FIXTURES / "single_files_sd.json.gz"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
