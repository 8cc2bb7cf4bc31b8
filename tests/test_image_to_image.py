"""Pictures from pictures: image to image of every family against diffusers, and what is special."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_compilations, fake_noise, relative_error
from picture_checks import (
    check_encoding,
    check_pictures,
    check_reference,
    check_stages,
    compiled_fast,
    load,
    read_reference,
    requests_of,
    run_steps,
)
from picture_files import (
    CASES,
    PNDM,
    PNDM_DEVIATION,
    PNDM_FIRST,
    PNDM_MEAN,
    PNDM_STEPS,
    make_picture,
)
from PIL import Image
from toy import Gaussian

import eqxdiff
from eqxdiff.sampling import discrete_schedule, find_sampler, parse_discrete_config, sample


NAMES = [name for name, case in CASES.items() if "mask" not in case]
SHIPPED = ("sd15-euler-batch", "sdxl-sizes", "dev")
"""One case a family, compiled as users compile it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("sd15-all", *SHIPPED)])
def test_every_stage_agrees_with_diffusers(name, root):
    with compiled_fast():
        check_encoding(name, root)
        check_stages(name, root)
        check_pictures(name, root)


@pytest.mark.filterwarnings("ignore::eqxdiff.CutPromptWarning")  # as diffusers cuts it
@pytest.mark.parametrize("name", SHIPPED)
def test_every_stage_agrees_as_users_compile_it(name, root):
    check_stages(name, root)
    check_pictures(name, root)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_sees_prompt_and_picture(name):
    check_reference(name)


def test_strength_1_ignores_the_picture(root):
    """It is the same as no picture, to the bit. With diffusers some of the picture stays in Stable
    Diffusion's first noise: with that in ours too, the latents are theirs."""
    name, case = "sd15-all", CASES["sd15-all"]
    pipe, (request,) = load(name, root), requests_of(case)
    bare = dataclasses.replace(
        request,
        image=None,
        encode_noise=None,
        settings={n: v for n, v in request.settings.items() if n != "strength"},
    )
    with compiled_fast():
        ours, without = (eqxdiff.generate(pipe, one).latents for one in (request, bare))
        assert np.array_equal(ours, without)
        example = eqxdiff.prepare(pipe, request)
        assert example.clean is None
        latent = jnp.asarray(read_reference()[f"{name}/encoded"][0]).transpose(1, 2, 0)
        leaking = dataclasses.replace(example, clean=latent)
        theirs = run_steps(pipe, [leaking])[-1]
    wanted = read_reference()[f"{name}/final"]
    assert relative_error(theirs, wanted) < 2e-5
    assert 1e-3 < relative_error(ours, wanted) < 0.1


# Which steps are taken.


@pytest.mark.parametrize("model", ["sd15", "flux-dev"])
def test_strength_decides_on_the_steps_as_in_diffusers(model, tmp_path):
    """Stable Diffusion rounds the number of steps down, and FLUX.1 that of those left out."""
    from eqxdiff.convert.example import write_example

    write_example(model, tmp_path / model)
    plan = eqxdiff.open_model(model, str(tmp_path / model))
    for steps in (1, 3, 5, 28, 50):
        for strength in (0.02, 0.1, 0.3, 0.5, 0.58, 0.6, 0.7, 0.9, 0.999, 1.0):
            if model == "sd15":
                left = min(int(steps * strength), steps)
            else:
                left = steps - int(max(steps - min(steps * strength, steps), 0))
            given = {"steps": steps, "strength": strength}
            if left == 0:
                with pytest.raises(eqxdiff.SettingError, match=r"`strength` \S+ leaves none of"):
                    plan.resolve(given)
                continue
            schedule = plan.model.recipe(plan.resolve(given)).schedule
            whole = plan.model.recipe(plan.resolve({"steps": steps})).schedule
            assert schedule.steps == left
            assert np.array_equal(schedule.timestep, whole.timestep[steps - left :])


def test_pndm_is_better_than_diffusers_from_a_later_step():
    """Its pipelines leave out timesteps without regard to the second, which PNDM lists twice: from
    then on each formula is applied at the level of the step after its own. Ours are applied where
    they belong, so that they come closer to the exact result for normal data."""
    config = parse_discrete_config({"_class_name": "PNDMScheduler", **PNDM}, name="a test")
    sampler = find_sampler("pndm")
    whole = discrete_schedule(config, PNDM_STEPS, sampler.grid)
    reference = {name: read_reference()[f"pndm/{name}"] for name in ("timesteps", "start", "final")}
    denoiser = Gaussian(jnp.full(16, PNDM_MEAN), jnp.full(16, PNDM_DEVIATION))
    errors = {}
    for name, first in (("ours", PNDM_FIRST), ("theirs", PNDM_FIRST - 1)):
        schedule = whole.since(first)  # diffusers begins one step sooner than it says
        x = jnp.asarray(reference["start"], jnp.float32)
        exact = denoiser.flow(x, schedule[0], schedule[-1])
        found = sample(denoiser, x, schedule, sampler.solver)
        errors[name] = relative_error(found if name == "ours" else reference["final"], exact)
    assert round(float(whole.timestep[PNDM_FIRST - 1])) == reference["timesteps"][0]
    print(errors)
    assert errors["ours"] < errors["theirs"] / 2


# One program for all pictures.


def test_another_picture_recompiles_nothing(root):
    name = "sd15-ddim"
    pipe, case = load(name, root), CASES[name]
    (request,) = requests_of(case)
    with compiled_fast():
        eqxdiff.generate(pipe, dataclasses.replace(request, encode_noise=None))  # draws it once
        first = eqxdiff.generate(pipe, request)
        with count_compilations() as compiled:
            for changes in (
                {"image": make_picture(9, 64, 96)},
                {"image": Image.fromarray(make_picture(9, 50, 70))},
                {"encode_noise": -request.encode_noise},
                {"encode_noise": None},
                {"prompt": "a dog"},
            ):
                other = eqxdiff.generate(pipe, dataclasses.replace(request, **changes))
                assert relative_error(other.latents, first.latents) > 1e-3, changes
    assert not compiled


def test_pictures_of_one_batch_do_not_mix(root):
    """Two pictures in one batch are what each is alone, and the noise of the seed decides all."""
    name = "sd15-euler-batch"
    pipe, case = load(name, root), CASES[name]
    requests = requests_of(case, noise=None, encode_noise=None, seed=5)
    with compiled_fast():
        both = eqxdiff.generate(pipe, requests, batch_size=2)
        again = eqxdiff.generate(pipe, requests, batch_size=2)
        alone = [eqxdiff.generate(pipe, [one] * 2, batch_size=2).latents[0] for one in requests]
    assert np.array_equal(both.latents, again.latents)
    assert relative_error(np.stack(alone), both.latents) < 1e-5


def test_one_picture_serves_all_prompts_of_a_call(root):
    """As keyword arguments of `generate`, with the same result as requests."""
    name = "sd15-euler-batch"
    pipe, case = load(name, root), CASES[name]
    requests = requests_of(case)
    image, settings = requests[0].image, dict(requests[0].settings)
    shared = [dataclasses.replace(one, image=image) for one in requests]
    both = {n: np.stack([getattr(one, n) for one in requests]) for n in ("noise", "encode_noise")}
    prompts = case["prompts"]
    with compiled_fast():
        wanted = eqxdiff.generate(pipe, shared, batch_size=2)
        found = eqxdiff.generate(pipe, prompts, image=image, batch_size=2, **both, **settings)
    assert np.array_equal(found.latents, wanted.latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None, "encode_noise": None}, "`strength` would be ignored without `image`"),
        ({"image": None, "strength": None}, "`encode_noise` would be ignored without `image`"),
        ({"strength": 0.0}, "`strength`"),
        ({"strength": 1.5}, "`strength` 1.5 is out of range"),
        ({"strength": 0.1}, "`strength` 0.1 leaves none of 5 steps"),
        ({"image": np.zeros((64, 96))}, "`image` has the shape"),
        ({"image": np.full((64, 96, 3), 1.5)}, "`image` has values out of range"),
        ({"noise": None, "encode_noise": fake_noise(4, 8, 8)}, "`encode_noise` has the shape"),
        ({"encode_noise": fake_noise(4, 8, 12) * np.nan}, "`encode_noise` is not made of finite"),
        ({"mask_blur": 2.0}, "`mask_blur` would be ignored without `mask`"),
        ({"mask_crop": 2}, "`mask_crop` would be ignored without `mask`"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, root):
    name = "sd15-ddim"
    (request,) = requests_of(CASES[name], **changes)
    with pytest.raises(eqxdiff.SettingError, match=message):
        eqxdiff.generate(load(name, root), request)


def test_the_cases_are_those_that_are_recorded():
    recorded = {name.split("/")[0] for name in read_reference()} - {"processor", "pndm"}
    assert recorded == set(CASES)
    text = json.dumps(CASES)
    assert all(model in text for model in ("sd15", "sd2-base", "sd21", "sdxl", "dev", "schnell"))
