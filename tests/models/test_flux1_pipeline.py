"""FLUX.1 from prompt to picture against diffusers, stage by stage, from the same noise."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES, fake_noise, relative_error, write_checkpoint

import eqxdiff
from eqxdiff.pipeline import expand, share, stack_examples


CASES = json.loads((FIXTURES / "flux1_pipeline.json").read_text())
SETTINGS = ("height", "width", "steps", "guidance", "cfg", "negative_prompt", "prompt_2")


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "flux1_pipeline.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux1")
    return {model: write_checkpoint(root / model, model) for model in ("flux-dev", "flux-schnell")}


def given(case) -> dict:
    settings = {name: case[name] for name in SETTINGS if name in case}
    return {**settings, "max_sequence_length": case["max_sequence_length"]}


def bound(reference, name: str, stage: str, floor: float, factor: float) -> float:
    """The floor, or some times what the reference itself loses to float32."""
    return max(floor, factor * reference[f"{name}/{stage}/rounding"])


def noise_of(case) -> np.ndarray:
    return fake_noise(len(case["prompts"]), 4, case["height"] // 8, case["width"] // 8)


def first_step(pipe, encoded, case, noise):
    """The latents after one step, (n, c, h, w)."""
    requests = expand(encoded, seed=0, num_images=1, given=given(case))
    requests = share(requests, "noise", noise, noise.shape[1:])
    batch = stack_examples([eqxdiff.prepare(pipe, each) for each in requests], len(requests))
    step = next(eqxdiff.steps(pipe.blueprint, pipe.stage("denoiser"), batch))
    return step.x.transpose(0, 3, 1, 2)


def check_case(name: str, folders, reference) -> None:
    """Every stage of one case. The mutation test breaks our code and sees this fail."""
    case = CASES[name]
    pipe = eqxdiff.load(case["model"], str(folders[case["model"]]), dtype=jnp.float32)
    encoded = pipe.encode(case["prompts"], **given(case))
    for stage in ("txt", "pooled"):
        value = getattr(encoded.roles["prompt"], stage)
        error = relative_error(value, reference[f"{name}/{stage}"])
        assert error < bound(reference, name, stage, 5e-6, 5), f"{stage}: {error:.1e}"

    noise = noise_of(case)
    first = first_step(pipe, encoded, case, noise)
    error = relative_error(first, reference[f"{name}/first"])
    assert error < bound(reference, name, "first", 5e-6, 5), f"first step: {error:.1e}"

    size = len(case["prompts"])
    result = eqxdiff.generate(pipe, encoded, noise=noise, batch_size=size, **given(case))
    error = relative_error(result.latents, reference[f"{name}/final"])
    assert error < bound(reference, name, "final", 2e-5, 10), f"latents: {error:.1e}"
    images = np.stack([np.asarray(image, np.int16) for image in result.images])
    difference = np.abs(images - reference[f"{name}/images"])
    assert difference.max() <= 1
    assert difference.mean() < 1e-3  # all values one too low would be no rounding error


@pytest.mark.parametrize("name", CASES)
def test_every_stage_agrees_with_diffusers(name, folders, reference):
    check_case(name, folders, reference)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_sees_the_prompt(name, reference):
    """Another prompt moves its final latents by a tenth at least."""
    assert reference[f"{name}/moved"] > 0.1
