"""What the recording scripts share: our deterministic weights in a PyTorch module."""

import re
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import fake_tensor


FIXTURES = Path(__file__).parents[1] / "fixtures"


def fill(module: torch.nn.Module, gain: float = 1.0, prefix: str = "") -> torch.nn.Module:
    """Gives every parameter its `fake_tensor`, in evaluation mode and without gradients."""
    state = module.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            value = fake_tensor(prefix + name, tuple(tensor.shape), gain)
            state[name] = torch.from_numpy(value).to(tensor.dtype)
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def write_manifest(
    name: str, shapes: dict[str, tuple[int, ...]], layers: str = r".*?_blocks"
) -> None:
    """Writes tensor names and shapes as `helpers.read_manifest` reads them, blocks in one line.

    `layers` is what the number of a block follows.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for tensor, shape in shapes.items():
        head, index, tail = re.fullmatch(rf"(?:({layers})\.(\d+)\.)?(.*)", tensor).groups()
        pattern = tail if head is None else f"{head}.#.{tail}"
        groups.setdefault((pattern, tuple(shape)), []).append(int(index or 0))
    lines = []
    for (pattern, shape), indices in groups.items():
        starts = [index for index in indices if index - 1 not in indices]
        stops = [index for index in indices if index + 1 not in indices]
        for start, stop in zip(starts, stops, strict=True):
            blocks = str(start) if start == stop else f"{{{start}..{stop}}}"
            lines.append(" ".join([pattern.replace("#", blocks), *map(str, shape)]))
    (FIXTURES.parent / "manifests" / f"{name}.txt").write_text("\n".join(lines) + "\n")
