"""The pipelines of Stable Diffusion against diffusers, stage by stage, from the same noise."""

from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from helpers import FIXTURES, fake_noise, relative_error
from sd_files import CASES, picture, write_case

import eqxdiff
from eqxdiff.pipeline import expand, share, stack_examples, to_bytes
from eqxdiff.pipeline.sample import decode_batch


OTHERS = ("gain", "model", "prompts", "others", "controls", "scheduler", "reference")
"""What is in a case besides settings."""


@cache
def read_reference() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "sd_pipeline.npz") as file:
        return dict(file)


def given(case: dict) -> dict:
    return {name: value for name, value in case.items() if name not in OTHERS}


def load(name: str, root: Path, **options) -> eqxdiff.Pipeline:
    """The pipeline of a case, whose files are written once."""
    case, folder = CASES[name], root / name
    if not folder.exists():
        write_case(folder, case)
    nets = [str(folder / f"controlnet_{i}") for i in range(len(case.get("controls", ())))]
    options = {"controlnets": nets, "dtype": jnp.float32, **options}
    return eqxdiff.load(case["model"], str(folder / "model"), steps=case["steps"], **options)


def controls_of(case: dict, seed: int = 0) -> list[eqxdiff.ControlImage]:
    def one(i: int, control: dict) -> eqxdiff.ControlImage:
        return eqxdiff.ControlImage(picture(seed + i, case["height"], case["width"]), **control)

    return [one(i, control) for i, control in enumerate(case.get("controls", ()))]


def noise_of(case: dict) -> np.ndarray:
    return fake_noise(len(case["prompts"]), 4, case["height"] // 8, case["width"] // 8)


def requests_of(encoded: eqxdiff.Encoded, case: dict) -> list[eqxdiff.Request]:
    noise, controls = noise_of(case), controls_of(case)
    requests = expand(encoded, seed=0, num_images=1, given=given(case), controls=controls)
    return share(requests, "noise", noise, noise.shape[1:])


def sample(pipe: eqxdiff.Pipeline, encoded: eqxdiff.Encoded, case: dict) -> list[np.ndarray]:
    """The latents, (n, c, h, w), after each step."""
    requests = requests_of(encoded, case)
    batch = stack_examples([eqxdiff.prepare(pipe, each) for each in requests], len(requests))
    steps = eqxdiff.steps(pipe.blueprint, pipe.stage("denoiser"), batch)
    return [np.asarray(step.x).transpose(0, 3, 1, 2) for step in steps]


def assert_agrees(value, name: str, floor: float, factor: float) -> None:
    """Within the floor, or some times what the reference itself loses to float32."""
    reference = read_reference()
    error = relative_error(value, reference[name])
    bound = max(floor, factor * float(reference[f"{name}/rounding"]))
    print(f"{name}: {error:.1e}, at most {bound:.1e}")
    assert error < bound, f"{name}: {error:.1e}"


@cache
def loaded(name: str, root: Path) -> eqxdiff.Pipeline:
    return load(name, root)


def check_prompt(name: str, root: Path) -> eqxdiff.Encoded:
    """What the network is told of the prompt."""
    case = CASES[name]
    encoded = loaded(name, root).encode(case["prompts"], **given(case))
    said = encoded.roles["prompt"]
    pooled = f"{name}/pooled" in read_reference()
    assert_agrees(said.context if pooled else said, f"{name}/context", 5e-6, 5)
    if pooled:
        assert_agrees(said.pooled, f"{name}/pooled", 5e-6, 5)
    return encoded


def check_latents(name: str, root: Path) -> eqxdiff.Encoded:
    """The prompt, and the latents after the first step and the last."""
    case, encoded = CASES[name], check_prompt(name, root)
    latents = sample(loaded(name, root), encoded, case)
    assert len(latents) == case["steps"]
    assert_agrees(latents[0], f"{name}/first", 5e-6, 5)
    assert_agrees(latents[-1], f"{name}/final", 2e-5, 10)
    return encoded


def check_picture(name: str, root: Path) -> None:
    """What the recorded latents are decoded to, in 8 bits."""
    latents = jnp.asarray(read_reference()[f"{name}/final"]).transpose(0, 2, 3, 1)
    pipe = loaded(name, root)
    arrays, _ = decode_batch(pipe.blueprint, pipe.stage("vae"), latents, False)
    check_bytes(name, to_bytes(np.asarray(arrays)))


def check_case(name: str, root: Path) -> None:
    """All stages, and then all in one call of `generate`."""
    case, encoded = CASES[name], check_latents(name, root)
    result = eqxdiff.generate(
        loaded(name, root),
        encoded,
        noise=noise_of(case),
        batch_size=len(case["prompts"]),
        controls=controls_of(case),
        **given(case),
    )
    assert_agrees(result.latents, f"{name}/final", 2e-5, 10)
    check_bytes(name, np.stack([np.asarray(image) for image in result.images]))


def check_bytes(name: str, images: np.ndarray) -> None:
    difference = np.abs(images.astype(np.int16) - read_reference()[f"{name}/images"])
    assert difference.max() <= 1
    assert difference.mean() < 1e-3  # all values one too low would be no rounding error


def check_reference(name: str) -> None:
    """Another prompt moves the final latents by a tenth at least, and so does another picture."""
    reference = read_reference()
    assert reference[f"{name}/moved"] > 0.1
    if CASES[name].get("controls"):
        assert reference[f"{name}/moved by picture"] > 0.1
