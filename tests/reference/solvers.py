"""Records what diffusers' schedulers compute with a toy network: sigmas, timesteps, trajectories.

Run `python tests/reference/solvers.py`; it writes tests/fixtures/solvers.npz.
"""

import importlib
import sys
import types
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
from helpers import fake_tensor  # noqa: E402
from sampler_cases import DISCRETE, FLOW  # noqa: E402


SIZE = 12


def network(x: torch.Tensor, timestep) -> torch.Tensor:
    """A nonlinear function of x and the timestep whose outputs are of order one."""
    mix = torch.from_numpy(fake_tensor("mix", (SIZE, SIZE), 1.5)).to(x.dtype)
    phase = torch.from_numpy(fake_tensor("phase", (SIZE,), 5.0)).to(x.dtype)
    t = torch.as_tensor(timestep).to(x.dtype) / 1000
    return torch.tanh(x @ mix.T) * (0.5 + t) + 0.5 * torch.cos(3 * t + phase)


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
    """x after each call of a flow's scheduler, from fixed noise."""
    x = start = unit_noise("noise")
    rows = [start]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        rows.append(x)
    return torch.cat(rows).numpy()


def unit_noise(name: str) -> torch.Tensor:
    return torch.from_numpy(fake_tensor(name, (SIZE,)))[None] * 5


def discrete() -> dict[str, np.ndarray]:
    out = {}
    for name, (cls, fields, steps, kwargs) in DISCRETE.items():
        out[f"discrete/{name}"], out[f"timesteps/{name}"] = discrete_case(
            cls, fields, steps, kwargs
        )
    return out


def discrete_case(cls: str, fields: dict, steps: int, kwargs: dict):
    """x after each step in the variance preserving scale, and what the network was told."""
    # The Brownian tree of DPMSolverSDEScheduler is replaced below, so its package is not needed.
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    module = {
        "DDIMScheduler": "ddim",
        "DDPMScheduler": "ddpm",
        "PNDMScheduler": "pndm",
        "EulerDiscreteScheduler": "euler_discrete",
        "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
        "HeunDiscreteScheduler": "heun_discrete",
        "LMSDiscreteScheduler": "lms_discrete",
        "DPMSolverMultistepScheduler": "dpmsolver_multistep",
        "DPMSolverSDEScheduler": "dpmsolver_sde",
        "UniPCMultistepScheduler": "unipc_multistep",
        "LCMScheduler": "lcm",
        "TCDScheduler": "tcd",
    }[cls]
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
    scheduler = getattr(module, cls).from_config(fields)
    scheduler.set_timesteps(steps)
    twice = cls in ("HeunDiscreteScheduler", "DPMSolverSDEScheduler")
    exploding = twice or cls in (
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
    )
    step = 0

    def draw(*_, **__):
        return unit_noise(f"noise/{step}/0")

    def brownian(s, s_to):
        if not scheduler.state_in_first_order:
            s_mid = (s * s_to) ** 0.5
            share = (s - s_mid) / (s - s_to)
            return share**0.5 * draw() + (1 - share) ** 0.5 * unit_noise(f"noise/{step}/1")
        return draw()

    module.randn_tensor = draw
    if cls == "DPMSolverSDEScheduler":
        scheduler.noise_sampler = brownian
    x = unit_noise("noise") * scheduler.init_noise_sigma
    rows, told = [x / scale(scheduler, 0) if exploding else x], []
    for call, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if exploding else x
        x = scheduler.step(network(scaled, t), t, x, return_dict=False, **kwargs)[0]
        if twice:
            done = call % 2 == 1 or call == len(scheduler.timesteps) - 1
            first = call % 2 == 0
        elif cls == "PNDMScheduler":  # its second call corrects the first step
            done = first = call != 1
            if call == 1:
                rows[-1] = x
        else:
            done = first = True
        if first:
            told.append(float(t))
        if done:
            step += 1
            rows.append(x / scale(scheduler, call + 1) if exploding else x)
    return torch.cat(rows).to(torch.float32).numpy(), np.array(told, np.float32)


def scale(scheduler, index: int):
    return (scheduler.sigmas[index] ** 2 + 1) ** 0.5


def main() -> None:
    np.savez_compressed(TESTS / "fixtures" / "solvers.npz", **flow(), **discrete())


if __name__ == "__main__":
    main()
