"""Every constant and convention of the UNet and ControlNet, broken one at a time: each must fail a
test."""

import jax
import pytest
import test_controlnet
import test_unet
from mutate import Mutation, apply


UNET, BLOCKS, CONTROL = "models._unet", "models._unet_blocks", "models._controlnet"
MUTATIONS = [
    Mutation("epsilon of layer norms", "norms-sd1", BLOCKS, "LAYER_NORM_EPS", "1e-6"),
    Mutation("epsilon of layer norms up", "norms-sd1", BLOCKS, "LAYER_NORM_EPS", "2e-5"),
    Mutation("epsilon before transformers", "norms-sd1", BLOCKS, "TRANSFORMER_NORM_EPS", "1e-5"),
    Mutation(
        "epsilon of residual blocks", "norms-sd1", f"{BLOCKS}:_resnet", "cfg.norm_eps", "1e-6"
    ),
    Mutation(
        "epsilon of the last norm",
        "norms-sd1",
        f"{UNET}:UNet.init",
        "cfg.out_channels, cfg.norm_eps",
        "cfg.out_channels, 1e-6",
    ),
    Mutation(
        "groups of residual blocks",
        "unet-sd2",
        f"{BLOCKS}:_resnet",
        "cfg.norm_num_groups",
        "cfg.norm_num_groups // 2",
    ),
    Mutation(
        "gelu by tanh", "unet-sd2", "nn.mlp:gelu_erf", "approximate=False", "approximate=True"
    ),
    Mutation(
        "the other half gates",
        "unet-sd2",
        f"{BLOCKS}:GatedMLP.__call__",
        "x, gate =",
        "gate, x =",
    ),
    Mutation(
        "heads of another width",
        "unet-sd2",
        f"{BLOCKS}:TransformerBlock.init",
        "cfg.block_out_channels[level], cfg.heads(level)",
        "cfg.block_out_channels[level], 1",
    ),
    Mutation(
        "heads of the middle",
        "unet-sd2",
        f"{BLOCKS}:MidBlock.init",
        "SpatialTransformer.init(cfg, level",
        "SpatialTransformer.init(type(cfg)(**{**vars(cfg), 'attention_head_dim': 2}), level",
    ),
    Mutation(
        "no attention to the image",
        "unet-sd2",
        f"{BLOCKS}:TransformerBlock.__call__",
        "x = x + self.attn1(y, y)",
        "x = x + self.attn1(y, y[:1])",
    ),
    Mutation(
        "no skip of a transformer",
        "unet-sd2",
        f"{BLOCKS}:SpatialTransformer.__call__",
        "return x + self",
        "return self",
    ),
    Mutation(
        "no norm before a transformer",
        "unet-sd2",
        f"{BLOCKS}:SpatialTransformer.__call__",
        "self.norm(x)",
        "x",
    ),
    Mutation(
        "no silu of the embedded timestep",
        "unet-sd2",
        "nn.resnet:ResnetBlock2D.__call__",
        "self.time_emb_proj(silu(temb))",
        "self.time_emb_proj(temb)",
    ),
    Mutation(
        "skips in the order of the way down",
        "unet-sd1",
        f"{BLOCKS}:UpBlock.__call__",
        "[x, own.pop()]",
        "[x, own.pop(0) if len({y.shape for y in own}) == 1 else own.pop()]",
    ),
    Mutation(
        "downsampling pads below only",
        "unet-sd2",
        f"{BLOCKS}:DownBlock.init",
        "padding=1",
        "padding=((0, 1), (0, 1))",
    ),
    Mutation(
        "odd sides lose their first row",
        "odd-sd2",
        "nn.resnet:Upsample2D.__call__",
        "x[: size[0], : size[1]]",
        "x[-size[0] :, -size[1] :]",
    ),
    Mutation(
        "sines first",
        "unet-sd2",
        f"{UNET}:embed",
        "flip_sin_to_cos=cfg.flip_sin_to_cos",
        "flip_sin_to_cos=not cfg.flip_sin_to_cos",
    ),
    Mutation(
        "frequencies",
        "unet-lcm",
        f"{UNET}:embed",
        "freq_shift=cfg.freq_shift",
        "freq_shift=1 - cfg.freq_shift",
    ),
    Mutation(
        "guidance counted from zero",
        "unet-lcm",
        f"{UNET}:TimeEmbedding.__call__",
        "1000 * (guidance - 1)",
        "1000 * guidance",
    ),
    Mutation(
        "frequencies of guidance",
        "unet-lcm",
        f"{UNET}:TimeEmbedding.__call__",
        "freq_shift=1",
        "freq_shift=0",
    ),
    Mutation(
        "cosines of guidance first",
        "unet-lcm",
        f"{UNET}:TimeEmbedding.__call__",
        "flip_sin_to_cos=False",
        "flip_sin_to_cos=True",
    ),
    Mutation(
        "time ids before the pooled prompt",
        "unet-sdxl",
        f"{UNET}:embed_time",
        "[added.text_embeds.astype(dtype), ids.astype(dtype)]",
        "[ids.astype(dtype), added.text_embeds.astype(dtype)]",
    ),
    Mutation(
        "time ids transposed",
        "unet-sdxl",
        f"{UNET}:embed_time",
        "(added.time_ids).reshape(-1)",
        "(added.time_ids).T.reshape(-1)",
    ),
    Mutation(
        "weakening in guess mode",
        "guess-sd2",
        f"{CONTROL}:ControlNet.__call__",
        "jnp.logspace(-1, 0,",
        "jnp.linspace(0.1, 1,",
    ),
    Mutation(
        "channels of the picture",
        "control-sd2",
        f"{CONTROL}:ControlNet.__call__",
        "image[:, :, ::-1]",
        "image",
    ),
    Mutation(
        "no silu after the picture's first layer",
        "control-sd2",
        f"{CONTROL}:ConditioningEmbedding.__call__",
        "silu(self.conv_in(image))",
        "self.conv_in(image)",
    ),
    Mutation(
        "scale of the middle",
        "control-sd2",
        f"{CONTROL}:ControlNet.__call__",
        "outputs[-1])",
        "outputs[-1] / scale)",
    ),
    Mutation(
        "one of several",
        "control-sd2",
        f"{CONTROL}:sum_residuals",
        "jax.tree.map(jnp.add, first, other)",
        "other",
    ),
    Mutation(
        "no control of the middle",
        "control-sd2",
        f"{UNET}:UNet.capture",
        "x = x + residuals.mid",
        "pass",
    ),
]
CACHES = (
    test_unet.skeleton,
    test_unet.load_unet,
    test_controlnet.skeleton,
    test_controlnet.controlnet,
)


def check(name: str) -> None:
    """The test that has to fail."""
    test, _, kind = name.partition("-")
    unet, control = test_unet.read_reference(), test_controlnet.read_reference()
    match test:
        case "unet":
            test_unet.test_the_unet_agrees_with_diffusers(unet, kind, "square")
        case "odd":
            test_unet.test_the_unet_agrees_with_diffusers(unet, kind, "odd")
        case "norms":
            test_unet.test_every_norm_has_the_epsilon_of_diffusers(unet, kind)
        case "guess":
            test_controlnet.test_residuals_agree_with_diffusers(control, kind, "guess")
        case "control":
            names = ("edges", "depth")
            test_controlnet.test_a_controlled_unet_agrees_with_diffusers(control, kind, names)
        case _:
            raise ValueError(name)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing broken stays in a cache."""
    clear()
    yield
    clear()


def clear() -> None:
    for cached in CACHES:
        cached.cache_clear()
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
    check(name)
