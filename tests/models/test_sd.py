"""Stable Diffusion 1.5 and 2 from prompt to picture against diffusers, and what is special."""

import dataclasses
from functools import partial

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled_fast, count_compilations, relative_error
from sd_checks import (
    CASES,
    check_case,
    check_reference,
    controls_of,
    given,
    load,
)

import eqxdiff
from eqxdiff.vae import coding, decode_tiled


NAMES = [name for name, case in CASES.items() if not case["model"].startswith("sdxl")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sd")


SHIPPED = ("sd15-pndm", "sd21-rescale")
"""What is compiled as users compile it. The rest takes less time."""


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_agrees_with_diffusers(name, root):
    """With CLIP's layers skipped only where nothing guides: ours are skipped for the negative
    prompt too."""
    with compiled_fast(name not in SHIPPED):
        check_case(name, root)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_sees_prompt_and_picture(name):
    check_reference(name)


def generate(pipe, case, controls=(), **changes):
    with compiled_fast():
        settings = {**given(case), **changes}
        prompts = settings.pop("prompts", case["prompts"])
        return eqxdiff.generate(pipe, prompts, controls=controls, **settings)


def test_nothing_recompiles_for_what_a_user_changes(root):
    pipe, case = load("sd21-rescale", root), CASES["sd21-rescale"]
    first = generate(pipe, case)
    with count_compilations() as compiled:
        for changes in (
            {"prompts": ["a dog"]},
            {"negative_prompt": "rain"},
            {"seed": 4},
            {"guidance": 2.0},
            {"guidance_rescale": 0.2},
            {"timestep_spacing": "trailing"},
        ):
            other = generate(pipe, case, **changes)
            assert relative_error(other.latents, first.latents) > 1e-2, changes
    assert not compiled


def test_nothing_recompiles_for_what_is_controlled(root):
    """With two ControlNets: the pictures, their scales, and when they act."""
    pipe, case = load("sd2-controls", root), CASES["sd2-controls"]
    one, two = controls_of(case)
    first = generate(pipe, case, (one, two))
    with count_compilations() as compiled:
        for controls in (
            controls_of(case, seed=5),
            (dataclasses.replace(one, scale=0.4), two),
            (dataclasses.replace(one, start=0.2), two),
            (dataclasses.replace(one, end=0.2), two),
        ):
            other = generate(pipe, case, controls)
            assert relative_error(other.latents, first.latents) > 1e-3
    assert not compiled


def test_noise_levels_recompile_nothing(root):
    """Nor does how they are spread."""
    pipe, case = load("sd-turbo", root), {**CASES["sd-turbo"], "steps": 3}
    first = generate(pipe, case)
    with count_compilations() as compiled:
        for change in ({"schedule": "karras"}, {"sigmas": (9.0, 5.0, 2.0)}):
            other = generate(pipe, case, **change)
            assert relative_error(other.latents, first.latents) > 1e-2
    assert not compiled


def flops(pipe, case, **changes) -> float:
    """Of a step of one example."""
    example = eqxdiff.prepare(pipe, case["prompts"][0], **{**given(case), **changes})
    denoiser = example.denoiser(pipe.blueprint.model, pipe.stage("denoiser"), jnp.float32)
    lowered = eqx.filter_jit(lambda denoiser, x, row: denoiser(x, row)).lower(
        denoiser, example.noise, example.recipe.schedule[0]
    )
    return lowered.lowered.cost_analysis()["flops"]


def test_a_guidance_of_1_or_0_costs_no_second_call(root):
    """And gives the same picture as one another."""
    pipe, case = load("sd2-ddim", root), CASES["sd2-ddim"]
    case = {name: value for name, value in case.items() if name != "negative_prompt"}
    costs = [flops(pipe, case, guidance=guidance) for guidance in (0.0, 1.0, 3.0)]
    assert costs[0] == costs[1]
    assert costs[2] > 1.8 * costs[0]


def test_sequential_guidance_is_guidance(root):
    """In two calls of the network on one example each, to rounding."""
    pipe, case = load("sd21-rescale", root), CASES["sd21-rescale"]
    both, one = (generate(pipe, case, sequential_guidance=value) for value in (False, True))
    assert relative_error(one.latents, both.latents) < 1e-5


def test_tiles_make_nearly_the_same_picture(root, monkeypatch):
    """Within the bound of tests/test_vae.py for random weights and small tiles."""
    pipe, case = load("sd-turbo", root), {**CASES["sd-turbo"], "height": 160, "width": 224}
    monkeypatch.setattr(coding, "decode_tiled", partial(decode_tiled, tile=16, overlap=8))
    run = partial(generate, pipe, case)
    whole, tiled = (run(vae_tiling=tiling) for tiling in (False, True))
    assert np.array_equal(whole.latents, tiled.latents)
    error = relative_error(tiled.arrays, whole.arrays)
    print(f"tiles: {error:.1e}")
    assert 1e-6 < error < 0.015  # what noise decodes to looks the same everywhere
