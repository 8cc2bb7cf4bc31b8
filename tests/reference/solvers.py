"""Records what diffusers' schedulers compute with a toy network: sigmas, timesteps, trajectories.

Run `python tests/reference/solvers.py`; it writes tests/fixtures/solvers.npz.
"""

import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
from helpers import fake_tensor  # noqa: E402


SIZE = 12
FLOW = {
    "static": {"shift": 3.0},
    "unshifted": {"shift": 1.0},
    "dynamic": {"shift": 3.0, "use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "narrow": {
        "use_dynamic_shifting": True,
        "base_shift": 0.4,
        "max_shift": 1.3,
        "base_image_seq_len": 128,
        "max_image_seq_len": 2048,
    },
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "karras": {"shift": 2.0, "use_karras_sigmas": True},
    "exponential": {"shift": 2.0, "use_exponential_sigmas": True},
    "beta": {"shift": 2.0, "use_beta_sigmas": True},
}


def network(x: torch.Tensor, timestep) -> torch.Tensor:
    """A nonlinear function of x and the timestep whose outputs are of order one."""
    mix = torch.from_numpy(fake_tensor("mix", (SIZE, SIZE), 1.5)).to(x.dtype)
    phase = torch.from_numpy(fake_tensor("phase", (SIZE,), 5.0)).to(x.dtype)
    t = torch.as_tensor(timestep).to(x.dtype) / 1000
    return torch.tanh(mix @ x) * (0.5 + t) + 0.5 * torch.cos(3 * t + phase)


def flow() -> dict[str, np.ndarray]:
    out = {}
    for name, fields in FLOW.items():
        for steps, tokens in [(1, 256), (4, 4096), (28, 1024), (50, 9216), (1000, 256)]:
            if steps == 1 and name == "terminal":  # 0 / 0
                continue
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**fields)
            out[f"flow/{name}/{steps}/{tokens}"] = flow_sigmas(scheduler, steps, tokens)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**FLOW["dynamic"])
    flow_sigmas(scheduler, 28, 1024)
    out["trajectory/flow/euler"] = trajectory(scheduler)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    out["sigmas/flow/heun"] = np.append(scheduler.sigmas[:-1][::2].numpy(), np.float32(0))
    out["trajectory/flow/heun"] = trajectory(scheduler)
    return out


def flow_sigmas(scheduler, steps: int, tokens: int) -> np.ndarray:
    """As in diffusers' FLUX pipeline."""
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas.numpy()


def trajectory(scheduler) -> np.ndarray:
    """x after each call of the scheduler, from fixed noise."""
    x = torch.from_numpy(fake_tensor("noise", (SIZE,), 1.0)) * 5 * scheduler_start(scheduler)
    rows = [x]
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, return_dict=False)[0]
        rows.append(x)
    return torch.stack(rows).numpy()


def scheduler_start(scheduler) -> float:
    return getattr(scheduler, "init_noise_sigma", 1.0)


if __name__ == "__main__":
    np.savez_compressed(TESTS / "fixtures" / "solvers.npz", **flow())
