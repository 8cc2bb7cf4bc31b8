"""What the library promises to those who build on it: one program for mixed batches, pure functions
that can be mapped and differentiated, hooks, iterators, stages, and float32 where it is asked for.
"""

import json
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, fake_tensor, relative_error, write_checkpoint
from picture_files import make_picture
from sd_files import write_controlnet

import eqxdiff
from eqxdiff import ControlImage, Hook, Request
from eqxdiff.pipeline import Job, stack_examples, texts
from eqxdiff.pipeline.inputs import encode_image
from eqxdiff.pipeline.sample import Loop, begin_batch, decode_batch, step_batch
from eqxdiff.sampling import AbstractGuider, Unguided
from eqxdiff.training import LogitNormal, Task, gradients
from eqxdiff.training.objectives import AutoencoderObjective, DenoiserObjective


pytestmark = pytest.mark.usefixtures("fast")

SMALL = {"height": 32, "width": 48, "steps": 3, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("dev"), "flux-dev"))


@pytest.fixture(scope="module")
def pipe(folder):
    return eqxdiff.load("flux-dev", folder)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """With a ControlNet."""
    root = tmp_path_factory.mktemp("sdxl")
    net = write_controlnet(root / "controlnet_0", "sdxl")
    return eqxdiff.load(
        "sdxl", str(write_checkpoint(root / "model", "sdxl")), controlnets=[str(net)]
    )


# --- one program ---


def request(number: int) -> Request:
    """One of several requests that differ in all that a user may change without compiling."""
    end = (1.0, 0.7, 0.4)[number]
    control = ControlImage(make_picture(10 + number, 32, 64), 0.2 + 0.1 * number, end=end)
    return Request.make(
        ("a lighthouse", "two cats on a hill", "rain")[number],
        seed=3 + number,
        height=32,
        width=64,
        steps=5,
        strength=(0.6, 0.7, 0.75)[number],  # three steps each
        image=make_picture(number, 32, 64),
        negative_prompt=(None, "grey fog", "")[number],
        guidance=(3.0, 5.0, 2.0)[number],
        guidance_rescale=(0.3, 0.6, 0.1)[number],
        guidance_start=(None, 0.3, 0.0)[number],
        guidance_end=(None, 1.0, 0.7)[number],
        original_size=(None, (300, 401), (90, 64))[number],
        crop=(None, (7, 20), (0, 3))[number],
        negative_target_size=(None, (512, 64), (90, 1000))[number],
        controls=[control],
    )


def test_a_batch_mixes_all_that_belongs_to_one_picture(sdxl):
    """Prompts, negative prompts, seeds, guidance and its interval, input and control pictures,
    their strengths, sizes: one program makes them, and each picture is as it is alone."""
    requests = [request(number) for number in range(3)]
    alone = list(eqxdiff.generate_each(sdxl, [requests[0]]))
    with count_compilations() as compiled:
        alone += eqxdiff.generate_each(sdxl, requests[1:])
    assert not compiled
    mixed = list(eqxdiff.generate_each(sdxl, requests[:2], batch_size=2))
    with count_compilations() as compiled:
        mixed += eqxdiff.generate_each(sdxl, requests[:0:-1], batch_size=2)
    assert not compiled
    for made, number in zip(mixed, (0, 1, 2, 1), strict=True):
        assert relative_error(made.latent, alone[number].latent) < 1e-5
        assert relative_error(made.array, alone[number].array) < 1e-5
    assert all(relative_error(a.latent, alone[0].latent) > 0.1 for a in alone[1:])


# --- maps and gradients ---


@eqx.filter_jit
def sweep(pipe, example, where, values):
    """The latents of examples that differ in one place."""
    one = lambda value: eqxdiff.sample_latent(pipe, eqx.tree_at(where, example, value))
    return jax.vmap(one)(values)


def examples_of(pipe, *changes: dict) -> list[eqxdiff.Example]:
    given = {"cfg": 2.0, **SMALL}
    return [eqxdiff.prepare(pipe, **{"request": "a cat", **given, **each}) for each in changes]


@pytest.mark.parametrize(
    ("where", "change"),
    [
        (lambda e: e.recipe.guider.scale, {"cfg": 4.0}),
        (lambda e: e.conditions, {"request": "a dog", "negative_prompt": "grey"}),
        (lambda e: e.noise, {"seed": 5}),
        (lambda e: e.recipe.schedule, {"shift": 2.0}),
        (lambda e: e.shared, {"guidance": 1.0}),
    ],
    ids=["scale", "condition", "noise", "schedule", "embedded guidance"],
)
def test_sampling_can_be_mapped_over_what_is_in_an_example(pipe, where, change):
    examples = examples_of(pipe, {}, change)
    made = sweep(pipe, examples[0], where, where(stack_examples(examples, 2)))
    for latent, example in zip(made, examples, strict=True):
        wanted = next(last(pipe, [example]))
        assert relative_error(latent, wanted[0]) < 1e-5
    assert relative_error(made[1], made[0]) > 1e-2


def last(pipe, examples, hooks=()):
    """Yields the latents after the last step of the iterator."""
    *_, step = eqxdiff.steps(
        pipe.blueprint, pipe.stage("denoiser"), stack_examples(examples, len(examples)), hooks
    )
    yield step.x


def test_gradients_go_through_sampling_and_decoding(pipe):
    """Of the guidance scale, the noise and a weight, against a central difference."""
    (example,) = examples_of(pipe, {"steps": 2})
    weight = lambda pipe: pipe.components["transformer"].proj_out.weight

    @eqx.filter_jit
    def score(parts, pipe, example):
        scale, noise, w = parts
        example = eqx.tree_at(lambda e: (e.recipe.guider.scale, e.noise), example, (scale, noise))
        pipe = eqx.tree_at(weight, pipe, w)
        picture = eqxdiff.decode(pipe, eqxdiff.sample_latent(pipe, example, remat="step"))
        return jnp.sum(picture * jnp.asarray(fake_tensor("direction", picture.shape)))

    parts = example.recipe.guider.scale, example.noise, weight(pipe)
    gradients = eqx.filter_jit(eqx.filter_grad(score))(parts, pipe, example)
    for place, size in enumerate((1e-2, 1e-2, 1e-3)):
        along = jnp.asarray(fake_tensor("along", parts[place].shape))
        moved = [
            tuple(part + h * along if i == place else part for i, part in enumerate(parts))
            for h in (size, -size)
        ]
        difference = [score(each, pipe, example) for each in moved]
        wanted = (difference[0] - difference[1]) / (2 * size)
        gradient = jnp.vdot(gradients[place], along)
        assert abs(gradient - wanted) < 0.02 * abs(wanted), place


# --- hooks and guiders ---


class Towards(eqx.Module):
    """An `on_x0` with arrays of its own."""

    target: jax.Array
    amount: jax.Array

    def __call__(self, x0, x, row, denoise):
        return x0 + self.amount * (self.target - x0)


class Shaken(eqx.Module):
    """An `on_x` with an array of its own."""

    noise: jax.Array

    def __call__(self, x, x0, moment):
        return jnp.where(moment.last, x, x + moment.to.sigma * self.noise)


def hooks_of(name: str, amount: float, noise: float) -> list[Hook]:
    array = lambda name: jnp.asarray(fake_tensor(name, (4, 6, 4), gain=5))
    towards = Towards(array(name), jnp.float32(amount))
    shaken = Shaken(jnp.asarray(fake_tensor(f"{name} noise", (4, 6, 4), gain=5 * noise)))
    return [Hook(on_x0=towards), Hook(on_x=shaken)]


def test_hooks_change_x0_and_x_with_arrays_of_their_own(pipe):
    made = lambda *values: eqxdiff.generate(pipe, "a cat", hooks=hooks_of(*values), **SMALL)
    plain = eqxdiff.generate(pipe, "a cat", **SMALL).latents
    assert relative_error(made("one", 0, 0).latents, plain) < 1e-5
    with count_compilations() as compiled:
        moved = [made(*values).latents for values in (("two", 0.4, 0), ("one", 0, 0.3))]
        whole = made("two", 1, 0).latents[0]
    assert not compiled
    assert all(relative_error(latents, plain) > 0.05 for latents in moved)
    assert relative_error(whole, fake_tensor("two", (4, 6, 4), gain=5).transpose(2, 0, 1)) < 1e-5


class EverySecond(AbstractGuider):
    """Calls the network in every second step and says the same again in the others."""

    roles: ClassVar[tuple[str, ...]] = ("prompt",)

    def init(self, x):
        return jnp.zeros((), jnp.int32), jnp.zeros_like(x)

    def __call__(self, predict, conditions, x, row, memory):
        count, kept = memory
        fresh = lambda: Unguided()(predict, conditions, x, row, None)[0]
        output = jax.lax.cond(count % 2 == 0, fresh, lambda: kept)
        return output, (count + 1, output)


def test_a_guider_of_ones_own_remembers(pipe):
    """In the scan and in the iterator, as Euler's method with half the calls."""
    example = eqxdiff.prepare(pipe, "a cat", **{**SMALL, "steps": 4})
    cached = eqx.tree_at(lambda e: e.recipe.guider, example, EverySecond())
    blueprint, schedule = pipe.blueprint, example.recipe.schedule
    network = blueprint.model.network(pipe.stage("denoiser"), example.shared, jnp.float32)
    condition = jax.tree.map(lambda leaf: leaf[0], example.conditions)
    call, x = eqx.filter_jit(lambda net, *inputs: net(*inputs)), example.start()
    for index in range(4):
        if index % 2 == 0:
            output = call(network, x, schedule[index], condition)
        x = x + (schedule.sigma[index + 1] - schedule.sigma[index]) * output
    scanned = eqx.filter_jit(eqxdiff.sample_latent)(pipe, cached)
    assert relative_error(scanned, x) < 1e-5
    assert relative_error(next(last(pipe, [cached]))[0], x) < 1e-5
    assert relative_error(next(last(pipe, [example]))[0], x) > 1e-3


class Redder(eqx.Module):
    """Guidance by the gradient of a score, here how red the decoded picture is."""

    pipe: eqxdiff.Pipeline
    strength: jax.Array

    def score(self, latent):
        red, *others = jnp.moveaxis(eqxdiff.decode(self.pipe, latent), -1, 0)
        return jnp.mean(red) - sum(map(jnp.mean, others)) / 2

    def __call__(self, x0, x, row, denoise):
        return x0 + self.strength * jax.grad(lambda x: self.score(denoise(x, row)))(x)


def test_a_score_of_the_picture_guides_in_a_few_lines(pipe):
    """As CLIP's similarity to a text would: through the decoder and through the denoiser."""
    decoder = pipe.without("text").without("denoiser")

    def score(strength: float) -> float:
        hook = Hook(on_x0=Redder(decoder, jnp.float32(strength)))
        array = eqxdiff.generate(pipe, "a cat", hooks=[hook], **{**SMALL, "steps": 2}).arrays[0]
        return float(array[..., 0].mean() - array[..., 1:].mean())

    scores = [score(strength) for strength in (-100.0, 0.0, 100.0)]
    assert scores[0] < scores[1] - 0.01
    assert scores[2] > scores[1] + 0.01


# --- the iterator ---


def test_steps_can_be_watched_and_left(pipe):
    example = eqxdiff.prepare(pipe, "a cat", **SMALL)
    whole = eqxdiff.generate(pipe, "a cat", **SMALL)
    batch, modules = stack_examples([example], 1), pipe.stage("denoiser")
    for step in eqxdiff.steps(pipe.blueprint, modules, batch):
        if step.number == 1:
            break
    assert step.row.timestep.shape == (1,)
    assert float(step.row.sigma[0]) == float(example.recipe.schedule.sigma[1])
    preview = np.asarray(eqxdiff.decode(pipe, step.x0[0]))
    assert preview.shape == (32, 48, 3)
    assert 0 <= preview.min() < preview.max() <= 1
    with count_compilations() as compiled:
        seen = [np.asarray(s.x0) for s in eqxdiff.steps(pipe.blueprint, modules, batch)]
    assert not compiled
    assert len(seen) == SMALL["steps"]
    # Euler's last step of a flow ends at the data that it began with.
    assert relative_error(seen[-1].transpose(0, 3, 1, 2), whole.latents) < 1e-5
    assert np.array_equal(seen[1], step.x0)
    assert relative_error(seen[0], seen[-1]) > 0.01


# --- two loads ---


def test_two_loads_of_a_model_are_one_to_jax(folder, pipe):
    other = eqxdiff.load("flux-dev", folder)
    assert jax.tree.structure(other) == jax.tree.structure(pipe)
    difference = jax.tree.map(lambda a, b: a - b, pipe, other)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(difference))

    @eqx.filter_jit
    def mine(pipe, latent):
        return eqxdiff.decode(pipe, latent)

    latent = jnp.zeros((4, 6, 4))
    first = np.asarray(mine(pipe, latent))
    eqxdiff.generate(pipe, "a cat", **SMALL)
    with count_compilations() as compiled:
        again = np.asarray(mine(other, latent))
        eqxdiff.generate(other, "a cat", **SMALL)
    assert not compiled
    assert np.array_equal(again, first)


def test_another_compute_dtype_is_another_program(folder, pipe):
    other = eqxdiff.load("flux-dev", folder, compute_dtype=jnp.bfloat16)
    assert jax.tree.structure(other) != jax.tree.structure(pipe)


# --- what is taken ---


@pytest.mark.parametrize("prompts", [[], ()])
def test_no_prompt_is_an_error(pipe, prompts):
    with pytest.raises(eqxdiff.PromptError, match="There is no prompt"):
        eqxdiff.generate(pipe, prompts)


def test_numbers_of_numpy_and_jax_are_numbers(pipe):
    plain = eqxdiff.generate(pipe, "a cat", seed=3, cfg=2.0, shift=1.5, **SMALL)
    given = {
        "steps": np.int64(3),
        "height": jnp.asarray(32),
        "width": np.int32(48),
        "cfg": jnp.float32(2.0),
        "shift": np.float32(1.5),
    }
    made = eqxdiff.generate(pipe, "a cat", seed=3, **{**SMALL, **given})
    assert np.array_equal(made.latents, plain.latents)
    assert made.pictures[0].settings == plain.pictures[0].settings
    json.dumps(vars(made.pictures[0].settings))


def test_noise_may_be_an_array_of_jax(pipe):
    zeros = [
        eqxdiff.generate(pipe, "a cat", noise=module.zeros((1, 4, 4, 6), "float32"), **SMALL)
        for module in (np, jnp)
    ]
    assert np.array_equal(zeros[0].latents, zeros[1].latents)
    assert np.isfinite(zeros[0].latents).all()


# --- what blocks say ---


def test_every_blocks_output_can_be_captured_under_jit(pipe):
    """Of the transformer and of both text encoders, whole or as what a function makes of it."""
    example = eqxdiff.prepare(pipe, "a cat", **SMALL)
    modules = pipe.components
    transformer, clip, t5 = (modules[n] for n in ("transformer", "text_encoder", "text_encoder_2"))
    tokens = jnp.arange(16)
    condition = jax.tree.map(lambda leaf: leaf[0], example.conditions)
    pixels, dim = 6, transformer.x_embedder.weight.shape[0]
    positions = jnp.arange(3.0 * (16 + pixels)).reshape(-1, 3)
    inputs = example.noise.reshape(pixels, -1), condition.txt, condition.pooled
    inputs = *inputs, jnp.float32(500), jnp.float32(3.5), positions

    @eqx.filter_jit
    def capture(transformer, clip, t5):
        mean = lambda x: jnp.mean(x, axis=0)
        return (
            (transformer(*inputs), *transformer.capture(*inputs)),
            transformer.capture(*inputs, keep=lambda out: jax.tree.map(mean, out))[1],
            (clip(tokens), *clip.capture(tokens)),
            (t5(tokens), *t5.capture(tokens)),
        )

    (plain, out, blocks), means, (said, own, states), (text, same, layers) = capture(
        transformer, clip, t5
    )
    assert jnp.array_equal(plain, out)
    double, single = (
        jax.tree.leaves(each)[0].shape[0]
        for each in (transformer.transformer_blocks, transformer.single_transformer_blocks)
    )
    assert blocks.double[0].shape == (double, pixels, dim)
    assert blocks.double[1].shape == (double, 16, dim)
    assert blocks.single.shape == (single, 16 + pixels, dim)
    assert relative_error(means.single, blocks.single.mean(axis=1)) < 1e-6
    assert relative_error(clip.final_layer_norm(states[-1]), said.last_hidden_state) < 1e-6
    assert jnp.array_equal(said.pooled, own.pooled)
    assert relative_error(t5.final_layer_norm(layers[-1]), text) < 1e-6
    assert jnp.array_equal(text, same)


# --- stages ---


def test_stages_make_the_same_pictures_wherever_encoders_wait(folder, pipe):
    """And encoders that are to be nowhere are freed before the first picture is sampled, and those
    in host memory, which on a CPU is the device's, after the last prompt."""
    shape = pipe.components["text_encoder_2"].shared.weight.shape
    count = lambda: sum(array.shape == shape for array in jax.live_arrays())
    prompts, before, seen = ["a cat", "a dog"], count(), {}
    wanted = eqxdiff.generate(pipe, prompts, **SMALL)

    for keep in ("device", "host", "nowhere"):

        def progress(what, done, total, keep=keep):
            if what == "sampling":
                seen.setdefault(keep, []).append(count() - before)

        stages = eqxdiff.Stages(eqxdiff.open_model("flux-dev", folder), keep=keep)
        made = eqxdiff.generate(stages, prompts, progress=progress, **SMALL)
        assert np.array_equal(made.arrays, wanted.arrays), keep
        assert set(stages.dtypes) == set(pipe.components)
        del stages
    assert set(seen["device"]) == {1}
    assert seen["host"][-1] == 0
    assert set(seen["nowhere"]) == {0}


def test_a_stage_is_loaded_when_it_is_needed(folder):
    loaded = []
    stages = eqxdiff.Stages(
        eqxdiff.open_model("flux-dev", folder),
        progress=lambda what, done, total: loaded.append(what) if done == total else None,
    )
    list(eqxdiff.generate_each(stages, [Request.make("a cat", **SMALL)], decode=False))
    assert [what.split()[-1] for what in loaded] == [
        "text_encoder",
        "text_encoder_2",
        "transformer",
    ]


# --- float32 products ---


def products(lowered) -> list[str]:
    """The lines of a program that multiply matrices or convolve."""
    text = lowered.lowered.as_text() if hasattr(lowered, "lowered") else lowered.as_text()
    names = "stablehlo.dot_general", "stablehlo.convolution"
    return [line for line in text.splitlines() if any(name in line for name in names)]


def programs(pipe) -> dict:
    """What is lowered when the library is called, not the command line."""
    blueprint, example = pipe.blueprint, eqxdiff.prepare(pipe, "a cat", cfg=2.0, **SMALL)
    model, dtype = blueprint.model, blueprint.compute_dtype
    batch = stack_examples([example], 1)
    loop = Loop(pipe.stage("denoiser"), batch, (), blueprint)
    x, state, _ = begin_batch(loop)
    tokens = Job.make(blueprint, 0, Request.make("a cat", **SMALL)).texts["prompt"].tokens
    image, vae = jnp.zeros((32, 48, 3)), pipe.stage("vae")

    def loss(pipe):
        return jnp.sum(eqxdiff.decode(pipe, eqxdiff.sample_latent(pipe, example)))

    keys, settings = jax.random.split(jax.random.key(0)), blueprint.resolve(SMALL)
    parameterization = example.recipe.parameterization
    denoising = DenoiserObjective(model, LogitNormal(), parameterization, None, settings, dtype)
    captions = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tokens)

    def train(loss, modules, batch):
        params, frozen = eqx.partition(modules, eqx.is_inexact_array)
        return eqx.filter_jit(gradients).lower(
            Task(frozen, loss, optax.sgd(0.1), keys[0]), params, batch, keys
        )

    return {
        "step": step_batch.lower((loop, jnp.asarray(0)), x, state),
        "text": texts.encode_text.lower(blueprint, pipe.stage("text"), tokens),
        "decode": decode_batch.lower(blueprint, vae, x, False),
        "encode": encode_image.lower(blueprint, vae, image, example.noise, False),
        "gradient": eqx.filter_jit(eqx.filter_grad(loss)).lower(pipe),
        "training": train(
            denoising, pipe.without("vae").components, (jnp.stack([x[0]] * 2), captions)
        ),
        "training of the autoencoder": train(
            AutoencoderObjective(0.1, 0.1, dtype), vae, jnp.stack([image, image])
        ),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_compute_is_float32_products(folder, dtype):
    """Everywhere, and nowhere where less is asked for but in what is always wide."""
    pipe = eqxdiff.load("flux-dev", folder, compute_dtype=dtype)
    for name, lowered in programs(pipe).items():
        found = products(lowered)
        assert len(found) > 5, name
        highest = [line for line in found if "HIGHEST" in line]
        if dtype == "float32":
            assert len(highest) == len(found), name
        else:
            assert not highest, name
