"""The pipeline: what recompiles, what a seed means, what may be absent, what is split."""

import pydoc
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_compilations, fake_noise, relative_error, write_checkpoint

import eqxdiff
from eqxdiff.pipeline import initial_noise


SMALL = {"height": 32, "width": 48, "steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("dev"), "flux-dev"))


@pytest.fixture(scope="module")
def pipe(folder):
    return eqxdiff.load("flux-dev", folder)


@pytest.fixture(scope="module")
def picture(pipe):
    return eqxdiff.generate(pipe, "a cat", seed=3, **SMALL)


def test_nothing_recompiles_for_what_a_user_changes(pipe, picture):
    with count_compilations() as compiled:
        for change in (
            {"seed": 4},
            {"guidance": 1.5},
            {"shift": 2.0},
            {"prompt_2": "a bird"},
        ):
            other = eqxdiff.generate(pipe, "a dog", **{**SMALL, **change})
            assert relative_error(other.latents, picture.latents) > 1e-2
    assert not compiled


def test_cfg_recompiles_once_and_not_for_its_value(pipe):
    first = eqxdiff.generate(pipe, "a cat", cfg=2.0, **SMALL)
    with count_compilations() as compiled:
        second = eqxdiff.generate(pipe, "a cat", cfg=3.0, negative_prompt="grey", **SMALL)
    assert not compiled
    assert relative_error(second.latents, first.latents) > 1e-2


def test_image_k_starts_from_the_noise_of_seed_plus_k():
    """Bit for bit: alone, in any batch and on any mesh."""
    shape = (4, 6, 8)
    alone = jnp.concatenate([initial_noise([seed], shape) for seed in (5, 6, 7, 8)])
    assert jnp.array_equal(initial_noise([5, 6, 7, 8], shape), alone)
    key = jax.random.key(6, impl="threefry2x32")
    assert jnp.array_equal(alone[1], jax.random.normal(key, shape, jnp.float32))
    mesh = eqxdiff.make_mesh(data=2, fsdp=2)
    spread = jax.jit(
        lambda: initial_noise([5, 6, 7, 8], shape),
        out_shardings=jax.NamedSharding(mesh, jax.P("data", "fsdp")),
    )
    assert jnp.array_equal(spread(), alone)


def test_a_request_starts_from_the_noise_of_its_seed(pipe):
    example = eqxdiff.prepare(pipe, "a cat", seed=3, **SMALL)
    key = jax.random.key(3, impl="threefry2x32")
    noise = jax.random.normal(key, (4, 4, 6), jnp.float32)
    assert jnp.array_equal(example.noise, noise.transpose(1, 2, 0))


def test_batches_change_no_picture(pipe, picture):
    """Six images in calls of four: the last call is padded, and nothing new is compiled for it."""
    settings = {**SMALL, "seed": 2, "num_images": 3, "batch_size": 4}
    result = eqxdiff.generate(pipe, ["a cat", "a dog"], **settings)
    assert result.seeds == [2, 3, 4, 2, 3, 4]
    assert result.arrays.shape == (6, 32, 48, 3)
    assert result.latents.shape == (6, 4, 4, 6)
    assert relative_error(result.latents[1], picture.latents[0]) < 1e-5
    with count_compilations() as compiled:
        eqxdiff.generate(pipe, ["a bird", "a bee"], **{**settings, "num_images": 1})
    assert not compiled


def test_injected_noise_takes_the_place_of_the_seed(pipe, picture):
    noise = np.asarray(initial_noise([3], (4, 4, 6)))
    again = eqxdiff.generate(pipe, "a cat", noise=noise, **SMALL)
    assert np.array_equal(again.latents, picture.latents)
    other = eqxdiff.generate(pipe, "a cat", noise=fake_noise(1, 4, 4, 6), **SMALL)
    assert relative_error(other.latents, picture.latents) > 0.1
    with pytest.raises(eqxdiff.SettingError, match=r"these images need \(1, 4, 4, 6\)"):
        eqxdiff.generate(pipe, "a cat", noise=fake_noise(1, 4, 6, 4), **SMALL)
    with pytest.raises(eqxdiff.SettingError, match="finite"):
        eqxdiff.generate(pipe, "a cat", noise=noise * np.nan, **SMALL)


def test_encoders_can_be_dropped_once_the_prompts_are_encoded(pipe, picture):
    encoded = pipe.encode("a cat", **SMALL)
    bare = pipe.without("text")
    assert set(bare.components) == {"transformer", "vae"}
    again = eqxdiff.generate(bare, encoded, seed=3, **SMALL)
    assert np.array_equal(again.arrays, picture.arrays)
    with pytest.raises(eqxdiff.SettingError, match="text_encoder"):
        eqxdiff.generate(bare, "a cat", **SMALL)


def test_prompts_encoded_without_guidance_are_not_used_with_it(pipe):
    encoded = pipe.encode("a cat", **SMALL)
    with pytest.raises(eqxdiff.SettingError, match="Encode the prompts"):
        eqxdiff.generate(pipe, encoded, cfg=2.0, **SMALL)


def test_a_pipeline_is_edited_as_a_pytree(pipe, picture):
    where = lambda pipe: pipe.components["transformer"].proj_out.weight
    edited = eqx.tree_at(where, pipe, 0.5 * where(pipe))
    other = eqxdiff.generate(edited, "a cat", seed=3, **SMALL)
    assert relative_error(other.latents, picture.latents) > 0.1


def test_what_is_not_finite_is_an_error_and_not_a_black_picture(pipe):
    where = lambda pipe: pipe.components["vae"].decoder.conv_out.bias
    broken = eqx.tree_at(where, pipe, where(pipe) * jnp.nan)
    with pytest.raises(eqxdiff.EqxdiffError, match="decoded image"):
        eqxdiff.generate(broken, "a cat", **SMALL)


def test_weights_and_activations_have_dtypes_of_their_own(folder, picture):
    half = eqxdiff.load("flux-dev", folder, dtype=jnp.bfloat16, compute_dtype=jnp.float32)
    assert half.components["transformer"].proj_out.weight.dtype == jnp.bfloat16
    result = eqxdiff.generate(half, "a cat", seed=3, **SMALL)
    assert 1e-4 < relative_error(result.latents, picture.latents) < 0.1


def test_a_mesh_changes_no_picture(folder, picture):
    """Weights split over two axes and the batch over two: eight devices."""
    mesh = eqxdiff.make_mesh(data=2, fsdp=2, tensor=2)
    pipe = eqxdiff.load("flux-dev", folder, mesh=mesh)
    weight = pipe.components["transformer"].transformer_blocks.attn.to_q.weight
    assert weight.sharding.spec == jax.P(None, "tensor", "fsdp")
    assert weight.addressable_shards[0].data.size * 4 == weight.size
    result = eqxdiff.generate(pipe, "a cat", seed=3, num_images=4, batch_size=4, **SMALL)
    assert relative_error(result.latents[0], picture.latents[0]) < 2e-5
    with pytest.raises(eqxdiff.SettingError, match="multiple"):
        eqxdiff.generate(pipe, "a cat", batch_size=3, **SMALL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 40}, "height 40 is not a multiple of 16: use 32 or 48"),
        ({"width": 8}, "width 8 is not a multiple of 16: use 16"),
        ({"width": 0}, "`width` 0 is out of range: it is at least 1"),
        ({"steps": 0}, "`steps` 0 is out of range"),
        ({"steps": 2.5}, "`steps` 2.5 is not of type int"),
        ({"guidance": "3"}, "`guidance` '3' is not of type float"),
        ({"negative_prompt": "grey"}, "would ignore `negative_prompt`"),
        ({"negative_prompt": "grey", "cfg": 1.0}, "give `cfg` above 1"),
        ({"shift": -1.0}, "`shift` -1.0 is out of range"),
        ({"shift": float("nan")}, "not a finite number"),
        ({"max_sequence_length": 513}, "from 1 to 512"),
        ({"step": 3}, "Did you mean `steps`"),
        ({"seed": -1}, "`seed` -1"),
        ({"num_images": 0}, "`num_images` 0"),
        ({"batch_size": 0}, "`batch_size` 0"),
        ({"sampler": "oiler"}, "[Ee]uler"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_honoured_are_errors(pipe, given, message):
    with pytest.raises(eqxdiff.SettingError, match=message):
        eqxdiff.generate(pipe, "a cat", **{**SMALL, **given})


def test_schnell_takes_no_guidance(tmp_path):
    folder = write_checkpoint(tmp_path, "flux-schnell")
    pipe = eqxdiff.load("flux-schnell", str(folder))
    with pytest.raises(eqxdiff.SettingError, match="embeds none"):
        eqxdiff.generate(pipe, "a cat", guidance=3.5, **SMALL)
    settings = pipe.blueprint.resolve({})
    assert (settings.steps, settings.guidance, settings.max_sequence_length) == (4, None, 256)


def test_settings_have_the_further_names_of_the_command_line(pipe, picture):
    own = {**SMALL, "guidance": 2.0}
    further = {"num_inference_steps": own.pop("steps"), "guidance_scale": own.pop("guidance")}
    resolved = pipe.blueprint.resolve({**own, **further})
    assert resolved == pipe.blueprint.resolve({**SMALL, "guidance": 2.0})
    with pytest.raises(eqxdiff.SettingError, match="another name of `steps`: give one"):
        pipe.blueprint.resolve({"steps": 2, "num_inference_steps": 3})


def test_the_package_shows_its_api_alone():
    assert dir(eqxdiff) == eqxdiff.__all__
    assert all(getattr(eqxdiff, name) is not None for name in eqxdiff.__all__)
    assert "Pipeline" in pydoc.plain(pydoc.render_doc(eqxdiff))


def test_dev_has_its_defaults(pipe):
    settings = pipe.blueprint.resolve({})
    assert (settings.steps, settings.guidance, settings.max_sequence_length) == (28, 3.5, 512)
    assert (settings.height, settings.width) == (1024, 1024)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(eqxdiff.SettingError, match="Did you mean flux-dev"):
        eqxdiff.load("flux-dv")


def test_a_cut_prompt_says_what_was_cut(pipe):
    encoded = pipe.encode("a cat " + "and a dog " * 40, **SMALL)
    assert encoded.dropped[0].endswith("and a dog")
    assert pipe.encode("a", **SMALL).dropped == ("",)


def test_a_tokenizer_for_another_encoder_is_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "text_encoder_2" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 384', '"vocab_size": 100'))
    with pytest.raises(eqxdiff.ConfigError, match="tokenizer_2 has 198 tokens"):
        eqxdiff.open_model("flux-dev", str(tmp_path / "model"))
