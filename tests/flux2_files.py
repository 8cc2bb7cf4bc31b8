"""What the recording of FLUX.2 and its tests share: cases, checkpoints and pictures."""

import json
from pathlib import Path

import numpy as np
from helpers import FIXTURES, write_checkpoint

from eqxdiff.models import find_model


CASES = json.loads((FIXTURES / "flux2.json").read_text())

PICTURES = ((64, 64), (71, 500), (1300, 900), (2000, 255))
"""Widths and heights of reference pictures: the last two are made smaller."""


def fake_picture(width: int, height: int) -> np.ndarray:
    """A picture of noise, `(height, width, 3)` in 8 bits, that depends on its size alone."""
    return np.random.RandomState(width + height).randint(
        256, size=(height, width, 3), dtype=np.uint8
    )


def write_case(folder: Path, case: dict) -> Path:
    """The tiny checkpoint of a case: its changes make each field of the configs show."""
    files = dict(find_model(case["model"])[0].example(case["model"]))
    for path, change in case.get("changes", {}).items():
        files[path] = json.dumps({**json.loads(files[path]), **change})
    return write_checkpoint(folder, case["model"], case["gain"], files)


def original_transformer(
    dim: int, head: int, text: int, channels: int, double: int, single: int, guidance: bool
) -> dict[str, tuple[int, ...]]:
    """The layout of https://github.com/black-forest-labs/flux2/blob/main/src/flux2/model.py"""
    shapes = {
        "img_in.weight": (dim, channels),
        "txt_in.weight": (dim, text),
        "double_stream_modulation_img.lin.weight": (6 * dim, dim),
        "double_stream_modulation_txt.lin.weight": (6 * dim, dim),
        "single_stream_modulation.lin.weight": (3 * dim, dim),
        "final_layer.adaLN_modulation.1.weight": (2 * dim, dim),
        "final_layer.linear.weight": (channels, dim),
    }
    for name in ("time_in", "guidance_in")[: 1 + guidance]:
        shapes[f"{name}.in_layer.weight"] = dim, 256
        shapes[f"{name}.out_layer.weight"] = dim, dim
    norms = lambda name: {f"{name}.{kind}_norm.scale": (head,) for kind in ("query", "key")}
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= {
                f"{block}_attn.qkv.weight": (3 * dim, dim),
                f"{block}_attn.proj.weight": (dim, dim),
                f"{block}_mlp.0.weight": (6 * dim, dim),
                f"{block}_mlp.2.weight": (dim, 3 * dim),
                **norms(f"{block}_attn.norm"),
            }
    for i in range(single):
        shapes[f"single_blocks.{i}.linear1.weight"] = 9 * dim, dim
        shapes[f"single_blocks.{i}.linear2.weight"] = dim, 4 * dim
        shapes |= norms(f"single_blocks.{i}.norm")
    return shapes
