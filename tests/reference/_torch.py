"""What the recording scripts share: our deterministic weights in a PyTorch module."""

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
