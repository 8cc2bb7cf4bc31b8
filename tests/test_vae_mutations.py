"""Every constant and convention of the autoencoder, broken one at a time: each must fail a test."""

import jax
import pytest
import test_vae
from mutate import Mutation, apply


VAE, BLOCKS, TILING, RESNET = "vae.autoencoder", "vae.blocks", "vae.tiling", "nn.resnet"
MUTATIONS = [
    Mutation("epsilon of the blocks up", "norms-sd", BLOCKS, "EPS", "1e-5"),
    Mutation("epsilon of the blocks down", "norms-sd", BLOCKS, "EPS", "1e-7"),
    Mutation("epsilon of the last norms", "norms-sd", VAE, "EPS", "1e-5"),
    Mutation(
        "groups of the blocks",
        "decode-sd",
        f"{BLOCKS}:_resnet",
        "groups = cfg.norm_num_groups",
        "groups = cfg.norm_num_groups // 2",
    ),
    Mutation(
        "groups of the attention",
        "decode-sd",
        f"{BLOCKS}:SpatialAttention.init",
        "groups=cfg.norm_num_groups",
        "groups=cfg.norm_num_groups // 2",
    ),
    Mutation(
        "padding on both sides",
        "encode-flux",
        BLOCKS,
        "DOWNSAMPLE_PADDING",
        "((1, 1), (1, 1))",
    ),
    Mutation("padding before", "encode-flux", BLOCKS, "DOWNSAMPLE_PADDING", "((1, 0), (1, 0))"),
    Mutation(
        "scale of the attention",
        "decode-sd",
        f"{BLOCKS}:SpatialAttention.__call__",
        "self.to_v(y))",
        "self.to_v(y), scale=(x.shape[-1] // 4) ** -0.5)",
    ),
    Mutation(
        "no skip of the attention",
        "encode-sd",
        f"{BLOCKS}:SpatialAttention.__call__",
        "return x + self",
        "return self",
    ),
    Mutation(
        "no norm before the attention",
        "decode-sd",
        f"{BLOCKS}:SpatialAttention.__call__",
        "self.group_norm(x)",
        "x",
    ),
    Mutation(
        "attention last",
        "decode-flux",
        f"{BLOCKS}:MiddleLevel.__call__",
        "x = attend(x)",
        "return attend(self.resnets[1](x))",
    ),
    Mutation(
        "upsampling in tiles",
        "decode-flux",
        f"{RESNET}:Upsample2D.__call__",
        "x[:, None, :, None, :], (h, 2, w, 2, c)",
        "x[None, :, None, :, :], (2, h, 2, w, c)",
    ),
    Mutation(
        "bilinear upsampling",
        "decode-flux",
        f"{RESNET}:Upsample2D.__call__",
        "jnp.broadcast_to(x[:, None, :, None, :], (h, 2, w, 2, c))",
        'jax.image.resize(x, (2 * h, 2 * w, c), "bilinear")',
    ),
    Mutation(
        "no activation in a block",
        "decode-flux",
        f"{RESNET}:ResnetBlock2D.__call__",
        "silu(self.norm1(x))",
        "self.norm1(x)",
    ),
    Mutation(
        "gelu in a block",
        "decode-flux",
        f"{RESNET}:ResnetBlock2D.__call__",
        "silu(self.norm2(y))",
        "jax.nn.gelu(self.norm2(y))",
    ),
    Mutation(
        "no activation before the image",
        "decode-flux",
        f"{VAE}:Decoder.__call__",
        "silu(self.conv_norm_out(x))",
        "self.conv_norm_out(x)",
    ),
    Mutation(
        "no activation before the moments",
        "encode-flux",
        f"{VAE}:Encoder.finish",
        "silu(self.conv_norm_out(self.mid_block(x)))",
        "self.conv_norm_out(self.mid_block(x))",
    ),
    Mutation(
        "shift before scale",
        "decode-flux",
        f"{VAE}:AutoencoderKL.to_decoder",
        "wide / self.scaling_factor + self.shift_factor",
        "(wide + self.shift_factor) / self.scaling_factor",
    ),
    Mutation(
        "scale before shift",
        "encode-flux",
        f"{VAE}:AutoencoderKL.normalize",
        "(wide - self.shift_factor) * self.scaling_factor",
        "wide * self.scaling_factor - self.shift_factor",
    ),
    Mutation(
        "no shift",
        "decode-flux",
        f"{VAE}:AutoencoderKL.init",
        "cfg.shift_factor or 0.0",
        "0.0",
    ),
    Mutation(
        "no convolution before the decoder",
        "decode-sd",
        f"{VAE}:AutoencoderKL.to_decoder",
        "self.post_quant_conv is None",
        "True",
    ),
    Mutation(
        "no convolution after the encoder",
        "encode-sd",
        f"{VAE}:AutoencoderKL.from_encoder",
        "self.quant_conv is not None",
        "False",
    ),
    Mutation(
        "variance before mean",
        "encode-sd",
        f"{VAE}:AutoencoderKL.from_encoder",
        "mean, logvar =",
        "logvar, mean =",
    ),
    Mutation("least variance", "posterior", VAE, "LOGVAR_RANGE", "(-20.0, 20.0)"),
    Mutation("greatest variance", "posterior", VAE, "LOGVAR_RANGE", "(-30.0, 30.0)"),
    Mutation(
        "variance for deviation",
        "posterior",
        f"{VAE}:Posterior.sample",
        "0.5 * self.logvar",
        "self.logvar",
    ),
    Mutation(
        "each tile by its own statistics",
        "tiles",
        f"{TILING}:_run_tiled",
        "whole.mass > 0",
        "whole.mass < 0",
    ),
    Mutation(
        "no fading at the seams",
        "tiles",
        f"{TILING}:_Grid.share",
        "2 * inside - 0.5",
        "1e6 * inside",
    ),
    Mutation(
        "variance between tiles",
        "tiles",
        f"{TILING}:_Moments.merge",
        "b * other.variance + between",
        "b * other.variance",
    ),
]


def check(name: str) -> None:
    """The test that has to fail."""
    test, _, kind = name.partition("-")
    test_vae.skeleton.cache_clear()
    test_vae.autoencoder.cache_clear()
    reference = test_vae.read_reference()
    match test:
        case "decode":
            test_vae.test_decoding_agrees_with_diffusers(reference, kind, "square")
        case "encode":
            test_vae.test_encoding_agrees_with_diffusers(reference, kind, "square")
        case "norms":
            test_vae.test_every_norm_has_the_epsilon_of_diffusers(reference, kind)
        case "posterior":
            test_vae.test_the_posterior_is_that_of_diffusers(reference)
        case "tiles":
            test_vae.test_tiles_hardly_differ_from_the_whole(4, 0.005, 0.008)
        case _:
            raise ValueError(name)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing broken stays in a cache."""
    yield
    test_vae.skeleton.cache_clear()
    test_vae.autoencoder.cache_clear()
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_seen(mutation, monkeypatch):
    apply(mutation, monkeypatch)
    with pytest.raises(AssertionError):
        check(mutation.check)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({mutation.check for mutation in MUTATIONS}))
def test_the_checks_pass_unbroken(name):
    jax.clear_caches()
    check(name)
