"""The autoencoder against diffusers."""

import dataclasses
import json
import math
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FIXTURES,
    compiled_fast,
    fake_module,
    fake_noise,
    fake_tensor,
    read_manifest,
    relative_error,
)
from jax.flatten_util import ravel_pytree

from eqxdiff._errors import CheckpointError, ConfigError
from eqxdiff.checkpoint import (
    check,
    export_infos,
    export_tensors,
    leaf_paths,
    load_module,
    read_table,
)
from eqxdiff.nn import Conv2d, GroupNorm
from eqxdiff.tensors import InMemory
from eqxdiff.vae import AutoencoderKL, AutoencoderKLConfig, decode_tiled, encode_tiled


KINDS = ("sd", "flux", "no_attention")
SIZES = ("square", "wide")
OLD_NAMES = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}
LEVELS = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PUBLISHED = {
    "sd15": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "in_channels": 3,
        "latent_channels": 4,
        "out_channels": 3,
        "sample_size": 512,
        **LEVELS,
    },
    "sdxl": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.20.0.dev0",
        "_name_or_path": "../sdxl-vae/",
        "act_fn": "silu",
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 4,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        **LEVELS,
    },
    "flux": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0.dev0",
        "_name_or_path": "../checkpoints/flux-dev",
        "act_fn": "silu",
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
        **LEVELS,
    },
}


@pytest.fixture(scope="module")
def reference():
    return read_reference()


@pytest.fixture
def level(size):
    """Squares are compiled as users compile them, and other sizes in less time."""
    with compiled_fast(size != "square"):
        yield


@cache
def read_reference():
    with np.load(FIXTURES / "vae.npz") as file:
        return dict(file)


@cache
def skeleton(config: AutoencoderKLConfig) -> AutoencoderKL:
    return eqx.filter_eval_shape(lambda: AutoencoderKL.init(config, key=jax.random.key(0)))


def config(kind: str) -> AutoencoderKLConfig:
    return AutoencoderKLConfig.parse(json.loads(str(read_reference()[f"{kind}/config"])))


def tensors(model: AutoencoderKL) -> dict[str, np.ndarray]:
    infos = export_infos(model, read_table("vae"))
    return {name: fake_tensor(name, info.shape) for name, info in infos.items()}


@cache
def autoencoder(kind: str, dtype=jnp.float32) -> AutoencoderKL:
    model = skeleton(config(kind))
    return load_module(InMemory(tensors(model)), read_table("vae"), model, dtype=dtype)


@eqx.filter_jit
def decode(vae: AutoencoderKL, latent):
    return vae.decode(latent)


@eqx.filter_jit
def encode(vae: AutoencoderKL, image):
    posterior = vae.encode(image)
    normalized = vae.normalize(posterior.mean)
    return {"mean": posterior.mean, "logvar": posterior.logvar, "normalized": normalized}


def assert_agrees(value, reference, name: str):
    bound = max(5e-6, 5 * float(reference[f"{name}/rounding"]))
    assert relative_error(value, reference[name]) < bound, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_decoding_agrees_with_diffusers(level, reference, kind, size):
    """Scaling and shift included, as the pipelines apply them."""
    latent = jnp.asarray(reference[f"{kind}/{size}/inputs/latent"])
    image = decode(autoencoder(kind), latent)
    assert_agrees(image, reference, f"{kind}/{size}/image")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_encoding_agrees_with_diffusers(level, reference, kind, size):
    image = jnp.asarray(reference[f"{kind}/{size}/inputs/image"])
    for output, value in encode(autoencoder(kind), image).items():
        assert_agrees(value, reference, f"{kind}/{size}/{output}")


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_every_norm_has_the_epsilon_of_diffusers(reference, kind):
    """On inputs of variance 1e-6, as large as the epsilon itself."""
    is_norm = lambda node: isinstance(node, GroupNorm)
    model = autoencoder(kind)
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_norm)[0]
    ours = {jax.tree_util.keystr(p, simple=True, separator="."): n for p, n in flat if is_norm(n)}
    x = jnp.asarray(reference[f"{kind}/norms/x"])
    names = {name.split("norms/")[1] for name in reference if f"{kind}/norms/" in name}
    assert set(ours) == names - {"x"}
    for name, norm in ours.items():
        y = norm(x[:, : norm.weight.shape[0]])
        assert relative_error(y, reference[f"{kind}/norms/{name}"]) < 5e-6, name


def test_the_posterior_is_that_of_diffusers(reference):
    """Log-variances beyond the range allowed are clipped; a sample is mean plus deviation times
    noise."""
    record = {n: reference[f"posterior/{n}"] for n in ("moments", "mean", "logvar", "std")}
    posterior = autoencoder("flux").from_encoder(jnp.asarray(record["moments"]))
    np.testing.assert_array_equal(posterior.mean, record["mean"])
    np.testing.assert_array_equal(posterior.logvar, record["logvar"])
    key = jax.random.key(3)
    noise = jax.random.normal(key, posterior.mean.shape)
    for drawn in (posterior.sample(key), posterior.sample(noise)):
        assert relative_error(drawn, record["mean"] + record["std"] * np.float64(noise)) < 5e-6


def test_normalize_is_what_decoding_undoes(reference):
    vae = autoencoder("flux")
    z = jnp.asarray(reference["flux/wide/mean"])
    assert relative_error(vae.to_decoder(vae.normalize(z)), z) < 1e-6


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_bfloat16_errs_no_more_than_diffusers(fast, reference, kind):
    """Against the same module in float32: ours at most 1.05 times theirs, medians of 8 inputs."""
    single, half = (autoencoder(kind, d) for d in (jnp.float32, jnp.bfloat16))
    ours = {"image": [], "mean": []}
    cfg = config(kind)
    for seed in range(8):
        rng = np.random.RandomState(100 + seed)  # as in the script that recorded theirs
        latent = jnp.asarray(rng.standard_normal((4, 4, cfg.latent_channels)), jnp.float32)
        side = 4 * cfg.downscale
        image = jnp.asarray(rng.uniform(-1, 1, (side, side, 3)), jnp.float32)
        rough = decode(half, latent.astype(jnp.bfloat16))
        mean = encode(half, image.astype(jnp.bfloat16))["mean"]
        assert rough.dtype == mean.dtype == jnp.bfloat16
        ours["image"].append(relative_error(rough, decode(single, latent)))
        ours["mean"].append(relative_error(mean, encode(single, image)["mean"]))
    for output, errors in ours.items():
        own, theirs = np.median(errors), np.median(reference[f"{kind}/bfloat16/{output}"])
        assert own <= 1.05 * theirs, f"{output}: ours {own:.4f}, theirs {theirs:.4f}"


def test_activations_may_have_another_dtype_than_weights(reference):
    latent = jnp.asarray(reference["sd/square/inputs/latent"])
    image = decode(autoencoder("sd", jnp.bfloat16), latent)
    assert image.dtype == jnp.float32
    assert 1e-4 < relative_error(image, reference["sd/square/image"]) < 0.05


def test_gradients_reach_the_input_and_every_weight(fast):
    """But for the keys' bias, which the softmax does not see."""
    cfg = dataclasses.replace(config("sd"), block_out_channels=(4, 8), norm_num_groups=2)
    cfg = dataclasses.replace(cfg, layers_per_block=1)
    vae = fake_module(AutoencoderKL.init, cfg)

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(inputs):
        vae, latent, image = inputs
        posterior = vae.encode(image)
        encoded = jnp.sum(posterior.mean**2) + jnp.sum(posterior.logvar**2)
        return encoded + jnp.sum(vae.decode(latent) ** 2)

    noise = lambda *shape: jnp.asarray(fake_noise(*shape))
    for path, leaf in leaf_paths(grad((vae, noise(4, 4, 4), noise(8, 8, 3)))).items():
        assert np.isfinite(leaf).all(), path
        assert path.endswith("to_k.bias") or np.abs(leaf).max() > 1e-3, path


def test_convolutions_round_once_and_have_gradients_in_bfloat16():
    """To the nearest of 8 bits, bias included."""
    conv = fake_module(partial(Conv2d.init, padding=1), 12, 6, 3, dtype=jnp.bfloat16)
    x = jnp.asarray(fake_noise(8, 8, 12), jnp.bfloat16)
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    exact = wide(conv)(wide(x))
    error = jnp.abs(wide(conv(x)) - exact)
    assert jnp.all(error <= 2.0**-9 * 2 ** jnp.ceil(jnp.log2(jnp.abs(exact))) + 1e-6)
    for argnums in (0, 1, (0, 1)):
        grad = jax.grad(lambda conv, x: jnp.sum(wide(conv(x)) ** 2), argnums)
        ours, theirs = (ravel_pytree(wide(grad(*p)))[0] for p in ((conv, x), wide((conv, x))))
        assert relative_error(ours, theirs) < 0.01


@pytest.mark.parametrize("axes", [(), (1, 1)], ids=["matrices", "convolutions"])
@pytest.mark.parametrize("old", [False, True], ids=["to_q", "query"])
def test_attention_may_be_spelled_in_any_way(reference, old, axes):
    model = skeleton(config("sd"))
    file = {}
    for name, array in tensors(model).items():
        if ".attentions." in name and array.ndim == 2:
            array = array.reshape(*array.shape, *axes)
        if old:
            for now, before in OLD_NAMES.items():
                name = name.replace(now, before)
        file[name] = array
    assert old == ("encoder.mid_block.attentions.0.proj_attn.weight" in file)
    loaded = load_module(InMemory(file), read_table("vae"), model)
    assert eqx.tree_equal(loaded, autoencoder("sd"))


def test_attention_is_written_as_diffusers_writes_it_now(reference):
    model = autoencoder("sd")
    written = dict(export_tensors(model, read_table("vae")))
    assert written["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (24, 24)


def test_attention_of_another_shape_is_an_error(reference):
    model = skeleton(config("sd"))
    file = tensors(model)
    file["encoder.mid_block.attentions.0.to_q.weight"] = np.ones((24, 24, 2), np.float32)
    with pytest.raises(CheckpointError, match=r"attentions\.0\.to_q\.weight is \(24, 24, 2\)"):
        load_module(InMemory(file), read_table("vae"), model)


@pytest.mark.parametrize(
    ("manifest", "names", "model", "count", "parameters"),
    [
        ("vae_sd", "old", "sd15", 248, 83_653_863),
        ("vae_sd", "new", "sdxl", 248, 83_653_863),
        ("vae_flux", "new", "flux", 244, 83_819_683),
    ],
)
def test_full_size_maps_onto_the_published_tensors(manifest, names, model, count, parameters):
    """Those of SD 1 and 2 have the old names of the attention, SDXL's and FLUX's those of today."""
    shapes = read_manifest(manifest)
    today = {}
    for name, shape in shapes.items():
        for now, before in OLD_NAMES.items():
            name = name.replace(before, now)
        today[name] = shape
    full, table = skeleton(AutoencoderKLConfig.parse(PUBLISHED[model])), read_table("vae")
    check(shapes if names == "old" else today, table, full)
    assert len(shapes) == count
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(full)) == parameters
    assert {name: info.shape for name, info in export_infos(full, table).items()} == today


def test_published_configs_are_read():
    configs = {name: AutoencoderKLConfig.parse(fields) for name, fields in PUBLISHED.items()}
    scales = {n: (c.scaling_factor, c.shift_factor) for n, c in configs.items()}
    assert scales == {"sd15": (0.18215, None), "sdxl": (0.13025, None), "flux": (0.3611, 0.1159)}
    quantized = {n: (c.use_quant_conv, c.use_post_quant_conv) for n, c in configs.items()}
    assert quantized == {"sd15": (True,) * 2, "sdxl": (True,) * 2, "flux": (False,) * 2}
    assert {(c.downscale, c.layers_per_block) for c in configs.values()} == {(8, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn: 'gelu' is not supported"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name: 'AutoencoderTiny' is not supported"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types: .* not supported"),
        (
            {"up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3},
            "up_block_types: .*'AttnUpDecoderBlock2D'.* is not supported",
        ),
        ({"latents_mean": [0.0, 1.0]}, r"latents_mean: \(0.0, 1.0\) is not supported"),
        ({"latents_std": [1.0, 1.0]}, r"latents_std: \(1.0, 1.0\) is not supported"),
        ({"norm_num_groups": 48}, "norm_num_groups: 48"),
        (
            {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
            "block_out_channels: an empty list",
        ),
        ({"norm_num_groups": 0}, "norm_num_groups: 0 is below 1"),
        ({"layers_per_block": 0}, "layers_per_block: 0 is below 1"),
        ({"latent_channels": "16"}, "latent_channels: '16' is not of type int"),
        ({"scaling_factor": 0}, "scaling_factor: 0"),
        ({"spatial_compression": 8}, "spatial_compression: an unknown field"),
    ],
)
def test_unsupported_configs_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKLConfig.parse({**PUBLISHED["flux"], **change})


def test_images_must_divide_into_latent_pixels(reference):
    vae = autoencoder("sd")
    for encode_ in (vae.encode, lambda image: encode_tiled(vae, image)):
        with pytest.raises(ValueError, match="14x16 is not a multiple of 4"):
            encode_(jnp.zeros((16, 14, 3)))


def smooth_noise(h: int, w: int, channels: int):
    """Unit noise with structure at many scales, so that parts differ in brightness and contrast."""
    rng, x = np.random.RandomState(5), 0
    for scale in (1, 4, 16):
        coarse = rng.standard_normal((-(-h // scale), -(-w // scale), channels))
        x = x + np.kron(coarse, np.ones((scale, scale, 1)))[:h, :w]
    return jnp.asarray(x / x.std(), jnp.float32)


def seam(x, whole) -> float:
    """The greatest step between neighbouring columns or rows of the error, over the mean step of
    the whole image."""
    steps = lambda x, axis: np.abs(np.diff(np.asarray(x), axis=axis)).mean(axis=(1 - axis, 2))
    ratio = lambda axis: steps(x - whole, axis).max() / steps(whole, axis).mean()
    return max(ratio(0), ratio(1))


@pytest.mark.parametrize(("passes", "error", "step"), [(2, 0.015, 0.02), (4, 0.005, 0.008)])
def test_tiles_hardly_differ_from_the_whole(fast, passes, error, step):
    """With random weights and small tiles by 0.8 %, with more passes by 0.4 %; nowhere by more than
    a step of 2 % of those that the image itself has."""
    vae, size = autoencoder("sd"), (20, 28)
    settings = {"tile": 16, "overlap": 8, "passes": passes}
    latent, image = smooth_noise(*size, 4), smooth_noise(*(vae.downscale * n for n in size), 3)
    posterior, moments = eqx.filter_jit(encode_tiled)(vae, image, **settings), encode(vae, image)
    pairs = {
        "image": (eqx.filter_jit(decode_tiled)(vae, latent, **settings), decode(vae, latent)),
        "mean": (posterior.mean, moments["mean"]),
        "logvar": (posterior.logvar, moments["logvar"]),
    }
    for name, (tiled, whole) in pairs.items():
        assert relative_error(tiled, whole) < error, name
        assert seam(tiled, whole) < step, name


def test_one_tile_is_the_whole(fast):
    vae, latent = autoencoder("no_attention"), smooth_noise(6, 10, 4)
    tiled = eqx.filter_jit(decode_tiled)(vae, latent, tile=10, overlap=4)
    assert relative_error(tiled, decode(vae, latent)) < 1e-6


@pytest.mark.parametrize("settings", [{"overlap": 0}, {"overlap": 64}, {"passes": 0}])
def test_impossible_tiles_are_an_error(settings):
    run = lambda latent: decode_tiled(autoencoder("no_attention"), latent, **settings)
    with pytest.raises(ValueError, match=r"overlap of|0 passes"):
        jax.eval_shape(run, jnp.zeros((80, 80, 4)))


@pytest.mark.parametrize("run", [AutoencoderKL.decode, decode_tiled], ids=["whole", "tiled"])
def test_a_full_size_picture_lowers(run):
    """1024x1024 in bfloat16; nothing is computed."""
    cfg = AutoencoderKLConfig.parse(PUBLISHED["flux"])
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    vae = jax.tree.map(lambda leaf: shaped(*leaf.shape), skeleton(cfg))
    lowered = jax.jit(lambda vae, latent: run(vae, latent)).lower(vae, shaped(128, 128, 16))
    assert (lowered.out_info.shape, lowered.out_info.dtype) == ((1024, 1024, 3), jnp.bfloat16)
