"""What is done before the loop, and in which order weights are kept: the results stay the same."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_module, fake_tensor, relative_error
from lora_files import components
from test_lora_runtime import adapter

from eqxdiff import lora, passes
from eqxdiff.checkpoint import export_tensors, read_table
from eqxdiff.models import find_model
from eqxdiff.models.flux1 import FluxCondition, Transformer, TransformerConfig
from eqxdiff.models.flux1.conditioning import FluxShared
from eqxdiff.models.flux1.predictor import FluxFlow, FluxPredictor
from eqxdiff.nn import AbstractLinear, Adapted, Linear, RMSNorm, side_by_side
from eqxdiff.sampling import (
    DPMppSDE,
    Flow,
    GuidedDenoiser,
    Heun,
    Hook,
    Row,
    Unguided,
    flow_schedule,
    sample,
    stack_conditions,
)


CONFIG = TransformerConfig(
    attention_head_dim=8,
    axes_dims_rope=(4, 2, 2),
    in_channels=8,
    joint_attention_dim=6,
    num_attention_heads=2,
    num_layers=1,
    num_single_layers=2,
    pooled_projection_dim=5,
    guidance_embeds=True,
)
# From a level above pure noise, where a step of some solvers is not finite.
X, SCHEDULE = jnp.asarray(fake_tensor("x", (4, 6, 2))), flow_schedule(4).since(1)


@pytest.fixture(scope="module")
def plain() -> Transformer:
    return fake_module(Transformer.init, CONFIG)


@pytest.fixture(scope="module")
def adapted(plain) -> Transformer:
    """With every kind of delta beside projections, norms and modulations, all of them non-zero."""

    def draw(name, *shape):
        return jnp.asarray(fake_tensor(name, shape)) / 3

    def full(layer, name):
        count, *shape = layer.weight.shape
        scale = draw(name, count, 1)
        if isinstance(layer, RMSNorm):
            return Adapted(layer, scale, change=draw(name, count, 1, *shape))
        out, width = shape
        return Adapted(
            layer,
            scale,
            down=draw(name, count, 1, 2, width),
            up=draw(name, count, out, 1, 2),
            rows=draw(name, count, 1, out),
            columns=draw(name, count, 1, width),
            bias_change=draw(name, count, 1, out),
        )

    where = lambda t: [
        t.transformer_blocks.attn.to_q,
        t.transformer_blocks.attn.norm_k,
        t.transformer_blocks.norm1.linear,
        t.single_transformer_blocks.attn.to_k,
        t.single_transformer_blocks.proj_out,
        t.single_transformer_blocks.norm.linear,
    ]
    layers = [full(layer, f"adapter {index}") for index, layer in enumerate(where(plain))]
    return eqx.tree_at(where, plain, layers)


def denoiser(transformer) -> GuidedDenoiser:
    condition = FluxCondition(*(jnp.asarray(fake_tensor(n, s)) for n, s in
                                (("txt", (3, 6)), ("pooled", (5,)))))  # fmt: skip
    network = FluxPredictor(transformer, FluxShared(jnp.float32(3.0)), jnp.dtype("float32"))
    return GuidedDenoiser(network, stack_conditions(condition), Unguided(), Flow())


@eqx.filter_jit
def at_once(transformer):
    """The network at the second row, with nothing computed ahead."""
    return denoiser(transformer)(X, SCHEDULE[1])


@eqx.filter_jit
def after(transformer):
    """The network at the second row and off the schedule, after what is computed ahead."""
    ahead = denoiser(transformer).ahead(X, SCHEDULE)
    return ahead(X, SCHEDULE[1]), ahead(X, Row(*(x + 1e-3 for x in vars(SCHEDULE[1]).values())))


# --- before the loop ---


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_what_is_computed_ahead_is_what_each_step_computes(kind, request):
    """With adapters at run time too; and off the schedule it is no number, not a wrong one."""
    transformer = request.getfixturevalue(kind)
    on, off = after(transformer)
    assert relative_error(on, at_once(transformer)) < 1e-6
    assert jnp.isnan(off).all()
    assert kind == "plain" or relative_error(on, after(request.getfixturevalue("plain"))[0]) > 0.01


def test_the_modulation_leaves_the_loop(plain):
    """The rest has all leaves but those of the modulation, the text and the timestep."""
    network = denoiser(plain).network
    assert isinstance(network, FluxPredictor)
    rest = network.rest()
    assert isinstance(rest, FluxFlow)
    kept = set(map(id, jax.tree.leaves(rest)))
    gone = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(plain)[0]
        if id(leaf) not in kept
    ]
    starts = [
        ".time_text_embed",
        ".context_embedder",
        ".transformer_blocks.norm1",
        ".single_transformer_blocks.norm.linear",
        ".norm_out",
    ]
    found = [[start for start in starts if name.startswith(start)] for name in gone]
    assert all(found)
    assert {start for each in found for start in each} == set(starts)


@pytest.mark.parametrize("solver", [Heun(), DPMppSDE()], ids=["heun", "sde"])
def test_solvers_that_ask_more_than_once_a_step_sample_the_same(plain, solver):
    """At the next row, and at rows within steps."""
    middle = [(a[1:] + a[:-1]) / 2 for a in (SCHEDULE.alpha, SCHEDULE.sigma, SCHEDULE.timestep)]
    schedule = dataclasses.replace(SCHEDULE, middle=Row(*middle))
    key = jax.random.key(0)

    @eqx.filter_jit
    def both(denoiser):
        direct = sample(lambda x, row: denoiser(x, row), X, schedule, solver, key=key)
        return sample(denoiser, X, schedule, solver, key=key), direct

    ahead, direct = both(denoiser(plain))
    assert relative_error(ahead, direct) < 2e-6


def test_a_hook_may_ask_for_any_row(plain):
    def ask(x0, x, row, denoise):
        return (x0 + denoise(x, Row(row.alpha, row.sigma, row.timestep + 3))) / 2

    run = eqx.filter_jit(sample)
    assert jnp.isfinite(run(denoiser(plain), X, SCHEDULE, Heun(), hooks=(Hook(on_x0=ask),))).all()


def test_gradients_go_through_what_is_computed_ahead(plain):
    """To weights of the modulation, to the prompt, and to the noise levels."""

    @eqx.filter_jit
    def both(transformer, schedule):
        def loss(arguments, ahead):
            transformer, schedule = arguments
            one = denoiser(transformer)
            one = one.ahead(X, schedule) if ahead else one
            return jnp.sum(jnp.square(one(X, schedule[1])))

        grad = lambda ahead: eqx.filter_grad(loss)((transformer, schedule), ahead)
        return grad(True), grad(False)

    for ahead, direct in zip(*map(jax.tree.leaves, both(plain, SCHEDULE)), strict=True):
        assert jnp.allclose(ahead, direct, rtol=2e-4, atol=2e-5 * float(jnp.abs(direct).max()))


# --- the order of weights ---


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_halves_compute_what_pairs_do_and_come_back(kind, request):
    transformer = request.getfixturevalue(kind)
    if kind == "adapted":  # the pass refuses attention of which a layer is of an unknown kind
        refused = passes.reorder_rope(transformer, "halves").transformer_blocks.attn
        assert refused.order == "pairs"
        assert refused.to_q is transformer.transformer_blocks.attn.to_q
        norm = lambda t: t.transformer_blocks.attn.norm_k
        transformer = eqx.tree_at(norm, transformer, norm(transformer).inner)
    halves = passes.reorder_rope(transformer, "halves")
    assert passes.is_fast(halves)
    assert not passes.is_fast(transformer)
    weight = halves.single_transformer_blocks.attn.to_q.weight
    assert not jnp.array_equal(weight, transformer.single_transformer_blocks.attn.to_q.weight)
    assert relative_error(at_once(halves), at_once(transformer)) < 1e-6
    assert eqx.tree_equal(passes.published(halves), transformer)


def test_a_layer_of_another_kind_keeps_its_place(plain):
    class Other(AbstractLinear):
        inner: Linear

        def __call__(self, x):
            return self.inner(x)

    where = lambda t: t.transformer_blocks.attn.to_k
    model = passes.fast(eqx.tree_at(where, plain, Other(where(plain))))
    assert model.transformer_blocks.attn.order == "pairs"
    assert model.single_transformer_blocks.attn.order == "halves"


def test_scores_are_bounded_where_the_gains_say_so(plain):
    """Over the gains of both streams and of all layers, and not where they are adapted."""
    blocks = lambda t: (t.transformer_blocks.attn, t.single_transformer_blocks.attn)
    assert all(attn.bounded for attn in blocks(passes.fast(plain)))
    where = lambda t: t.transformer_blocks.attn.norm_added_q.weight
    large = eqx.tree_at(where, plain, where(plain).at[0, 3].set(-30.0))
    assert [attn.bounded for attn in blocks(passes.fast(large))] == [False, True]
    assert not blocks(eqx.filter_jit(passes.bound_scores)(plain))[0].bounded


def test_files_and_loras_see_the_order_of_the_checkpoint():
    plain = components("flux-dev")["transformer"]
    table = read_table(find_model("flux-dev")[0].components["transformer"].table)
    fast = passes.fast(plain)
    for (name, value), (other, wanted) in zip(
        export_tensors(fast, table), export_tensors(plain, table), strict=True
    ):
        assert name == other
        assert np.array_equal(value, wanted), name
    for change in (lora.merge, lora.apply):
        changed = change(fast, adapter())
        assert passes.is_fast(changed)
        assert eqx.tree_equal(passes.published(changed), passes.published(
            passes.fast(change(plain, adapter()))))  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_parts_side_by_side_need_not_be_joined(bias):
    layer = Linear.init(7, 4, bias=bias, key=jax.random.key(0))
    a, b = jnp.asarray(fake_tensor("a", (5, 3))), jnp.asarray(fake_tensor("b", (5, 4)))
    wanted = layer(jnp.concatenate([a, b], axis=-1))
    assert relative_error(side_by_side(layer, a, b), wanted) < 3e-7
    both = Adapted(layer, jnp.ones(1), bias_change=jnp.ones((1, 4)))
    assert relative_error(side_by_side(both, a, b), wanted + 1) < 3e-7
    with pytest.raises(TypeError):
        side_by_side(layer, a, a)
