"""Stable Diffusion XL, Lightning and Turbo from prompt to picture against diffusers, and what is
special."""

import dataclasses
import json

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
from eqxdiff.vae import AutoencoderKL


NAMES = [name for name, case in CASES.items() if case["model"].startswith("sdxl")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sdxl")


SHIPPED = ("sdxl-zeros",)
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
    pipe, case = load("sdxl-zeros", root), CASES["sdxl-zeros"]
    first = generate(pipe, case)
    with count_compilations() as compiled:
        for changes in (
            {"prompts": ["a dog"]},
            {"prompt_2": "a dog"},
            {"negative_prompt": "rain"},
            {"negative_prompt": ""},
            {"negative_prompt_2": "rain"},
            {"seed": 4},
            {"guidance": 2.0},
            {"original_size": (300, 200)},
            {"crop": (20, 0)},
            {"target_size": (300, 200)},
            {"negative_original_size": (300, 200)},
            {"negative_crop": (20, 0)},
            {"negative_target_size": (300, 200)},
            {"schedule": "karras"},
            {"sigmas": (9.0, 5.0, 2.0, 1.0, 0.5)},
        ):
            other = generate(pipe, case, **changes)
            assert relative_error(other.latents, first.latents) > 1e-4, changes
    assert not compiled


def test_nothing_recompiles_for_what_is_controlled(root):
    """The picture, its scale, and when it acts."""
    pipe, case = load("sdxl-control", root), CASES["sdxl-control"]
    (one,) = controls_of(case)
    first = generate(pipe, case, (one,))
    with count_compilations() as compiled:
        for controls in (
            controls_of(case, seed=5),
            (dataclasses.replace(one, scale=0.2),),
            (dataclasses.replace(one, start=0.0),),
            (dataclasses.replace(one, end=0.6),),
        ):
            other = generate(pipe, case, controls)
            assert relative_error(other.latents, first.latents) > 1e-3
    assert not compiled


@pytest.mark.parametrize("force", [True, False])
def test_an_autoencoder_that_asks_for_float32_has_it(force, root, monkeypatch):
    """Whatever the rest computes in."""
    name, dtypes, decode = "lightning-1", [], AutoencoderKL.decode
    path = root / name / "model" / "vae" / "config.json"
    load(name, root)  # writes it
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "force_upcast": force}))
    pipe = load(name, root, compute_dtype=jnp.bfloat16)
    path.write_text(text)

    def spy(vae, latent):
        dtypes.append(latent.dtype)
        return decode(vae, latent)

    monkeypatch.setattr(AutoencoderKL, "decode", spy)
    result = generate(pipe, {**CASES[name], "width": 32})
    assert dtypes == [jnp.float32 if force else jnp.bfloat16]
    assert result.arrays.dtype == np.float32


def test_an_absent_negative_prompt_is_what_the_checkpoint_says(root):
    """Zeros, or the empty text, which a negative prompt of no letters always is."""
    case = CASES["sdxl-zeros"]

    def unconditional(text):
        given_ = {**given(case), "negative_prompt": text}
        with compiled_fast():
            conditions = eqxdiff.prepare(load("sdxl-zeros", root), "a", **given_).conditions
        return conditions.context[1], conditions.added.text_embeds[1]

    assert not any(leaf.any() for leaf in unconditional(None))
    empty = unconditional("")
    assert all(leaf.any() for leaf in empty)
    path = root / "sdxl-zeros" / "model" / "model_index.json"
    text = path.read_text()
    path.write_text(text.replace('zeros_for_empty_prompt": true', 'zeros_for_empty_prompt": false'))
    absent = unconditional(None)
    path.write_text(text)
    assert all(map(jnp.array_equal, absent, empty))
