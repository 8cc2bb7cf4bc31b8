"""Adapters at run time: several at once, without compiling again; and undone again."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_compilations, relative_error
from lora_files import FORMATS, QKV, Draft, components, noise
from test_lora_kinds import KINDS

from eqxdiff import lora
from eqxdiff._errors import CheckpointError, SettingError
from eqxdiff.checkpoint import Table
from eqxdiff.models.flux1 import Transformer
from eqxdiff.nn import Adapted, Linear, fold, stack
from eqxdiff.tensors import InMemory


def transformer() -> Transformer:
    module = components("flux-dev")["transformer"]
    assert isinstance(module, Transformer)
    return module


def call(model: Transformer):
    """The velocity of a few noisy patches: every block is scanned."""
    img, txt = jnp.asarray(noise("img", 6, 16)), jnp.asarray(noise("txt", 5, 32))
    pooled, number = jnp.asarray(noise("pooled", 32)), jnp.float32(500)
    positions = jnp.asarray(np.arange(33).reshape(11, 3), jnp.float32)
    return model(img, txt, pooled, number, number / 100, positions)


def adapter(name: str = "one", rank: int = 3, **rest: np.ndarray) -> lora.Adapter:
    """On attention, an MLP and the last modulation; others of the same shapes by other names."""
    draft = Draft("flux-dev")
    for stem, targets in (
        ("lora_unet_double_blocks_1_img_attn_qkv", QKV),
        ("lora_unet_single_blocks_0_linear2", "transformer:single_transformer_blocks.0.proj_out"),
        ("lora_unet_final_layer_adaLN_modulation_1", "transformer:norm_out.linear"),
    ):
        draft.lora(stem, targets, alpha=1, rank=rank)
    file = {key: a if "alpha" in key else noise(name + key, *a.shape) / 4 for key, a in
            draft.file.items()}  # fmt: skip
    return lora.parse_adapter(InMemory(file | rest), name=name)


def test_merged_and_at_run_time_a_model_computes_the_same():
    compute = eqx.filter_jit(call)
    for one in (adapter(), adapter().scaled("0.4,transformer.transformer_blocks.1.attn.to_q=-2")):
        plain, merged = compute(transformer()), compute(lora.merge(transformer(), one))
        assert relative_error(merged, plain) > 0.03
        assert relative_error(compute(lora.apply(transformer(), one)), merged) < 5e-6


def test_another_adapter_or_scale_compiles_nothing():
    """Of whatever rank up to the next power of two; the strength is a traced number."""
    compute = eqx.filter_jit(call)
    model = lora.apply(transformer(), adapter())
    compute(model)
    others = [adapter("two", rank=4), adapter("three", rank=2).scaled(0.3)]
    with count_compilations() as compiled:
        swapped = [compute(lora.swap(model, other)) for other in others]
        again = [compute(lora.apply(transformer(), other)) for other in others]
        scaled = compute(lora.rescale(model, ["0.5,transformer.norm_out=0"]))
    assert compiled == []
    for one, two, other in zip(swapped, again, others, strict=True):
        merged = compute(lora.merge(transformer(), other))
        assert relative_error(one, merged) < 5e-6
        assert relative_error(two, merged) < 5e-6
    merged = compute(lora.merge(transformer(), adapter().scaled("0.5,transformer.norm_out=0")))
    assert relative_error(scaled, merged) < 5e-6


def test_several_adapters_add_up():
    both = [adapter("one").scaled(0.5), adapter("two", rank=7).scaled(-0.25)]
    merged = lora.merge(transformer(), both)
    one_by_one = lora.merge(lora.merge(transformer(), both[0]), both[1])
    compute = eqx.filter_jit(call)
    wanted = compute(merged)
    assert relative_error(compute(one_by_one), wanted) < 5e-6
    assert relative_error(compute(lora.apply(transformer(), both)), wanted) < 5e-6


def test_reserved_room_takes_what_comes_later():
    """A larger rank, and layers that the first adapter does not touch."""
    compute = eqx.filter_jit(call)
    model = lora.apply(
        transformer(), adapter(), rank=16, reserve=("transformer.transformer_blocks",)
    )
    draft = Draft("flux-dev")
    draft.lora("lora_unet_double_blocks_0_txt_mlp_0",
               "transformer:transformer_blocks.0.ff_context.net.0.proj", rank=16)  # fmt: skip
    compute(model)
    with count_compilations() as compiled:
        swapped = compute(lora.swap(model, draft.adapter()))
    assert compiled == []
    merged = compute(lora.merge(transformer(), draft.adapter()))
    assert relative_error(swapped, merged) < 5e-6
    with pytest.raises(SettingError, match="There is no room for one in transformer"):
        lora.swap(lora.apply(transformer(), draft.adapter()), adapter())


def test_removing_gives_the_model_back():
    model = transformer()
    assert eqx.tree_equal(lora.remove(lora.apply(model, adapter())), model)


def test_unmerging_gives_the_model_back_but_for_rounding():
    back = lora.unmerge(lora.merge(transformer(), adapter()), adapter())
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(transformer()), strict=True):
        assert relative_error(one, two) < 1e-6


@pytest.mark.parametrize("kind", ["dora-rows", "set"])
def test_what_cannot_be_undone_is_not(kind):
    draft = Draft("flux-dev")
    KINDS[kind][0](draft, "lora_unet_img_in", "transformer:x_embedder")
    merged = lora.merge(transformer(), draft.adapter())
    with pytest.raises(SettingError, match="cannot be undone"):
        lora.unmerge(merged, draft.adapter())


def test_an_adapted_model_is_not_adapted_again():
    model = lora.apply(transformer(), adapter())
    for again in (lora.apply, lora.merge):
        with pytest.raises((SettingError, CheckpointError)):
            again(model, adapter())


def test_an_ensemble_of_adapters_is_one_call():
    compute = eqx.filter_jit(call)
    members = [adapter("one"), [adapter("two", rank=6).scaled(2), adapter("three")]]
    model, axes = lora.ensemble(transformer(), members)
    results = eqx.filter_jit(eqx.filter_vmap(call, in_axes=(axes,)))(model)
    for result, member in zip(results, members, strict=True):
        assert relative_error(result, compute(lora.merge(transformer(), member))) < 5e-6
    shapes = lambda m: [x.shape for x in jax.tree.leaves(m)]
    weights = eqx.filter(model, jax.tree.map(lambda own: not own, lora.adapter_leaves(model)))
    assert shapes(weights) == shapes(transformer())


def test_gradients_reach_adapters_and_nothing_else():
    """Through a scan over a stack of layers."""
    layers = stack(lambda key: Linear.init(8, 8, key=key), 3, key=jax.random.key(0))
    x = jnp.asarray(noise("x", 8))
    file = {"lora_A.weight": noise("down", 2, 8), "lora_B.weight": noise("up", 8, 2)}
    file = {f"blocks.{i}.{name}": array for i in range(3) for name, array in file.items()}
    table = Table.parse('stack = ["blocks"]', "tower")
    model = lora.apply(
        {"blocks": layers}, lora.parse_adapter(InMemory(file), name="x"), tables=[table]
    )
    own, rest = eqx.partition(model, lora.adapter_leaves(model))

    @jax.jit
    @jax.grad
    def loss(own):
        blocks = eqx.combine(own, rest)["blocks"]
        return jnp.sum(fold(blocks, x, lambda block, x: x + jnp.tanh(block(x)))[0])

    (node,) = [node for _, node in lora.adapted_layers(loss(own))]
    assert jax.tree.leaves(node.inner) == []
    assert node.scale.shape == (3, 1)
    assert all(jnp.any(layer != 0) for x in (node.up, node.down, node.scale) for layer in x)


def test_weights_in_bfloat16_are_rounded_once():
    cast = lambda tree, dtype: jax.tree.map(lambda x: np.asarray(x).astype(dtype), tree)
    model = cast(transformer(), jnp.bfloat16)
    both = [adapter("one").scaled(0.1), adapter("two").scaled(0.1)]
    merged = lora.merge(model, both)
    wanted = cast(lora.merge(cast(model, np.float32), both), jnp.bfloat16)
    for one, two in zip(jax.tree.leaves(merged), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.array_equal(one, two)


def test_adapters_live_where_their_weights_do():
    """On a mesh, merged weights keep their sharding."""
    from eqxdiff.models import find_model
    from eqxdiff.sharding import make_mesh, parameter_sharding

    mesh, family = make_mesh(fsdp=2, tensor=2), find_model("flux-dev")[0]
    rules = family.components["transformer"].rules

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jax.device_put(leaf, parameter_sharding(name, leaf.shape, rules, mesh))

    model = jax.tree_util.tree_map_with_path(place, transformer())
    merged = lora.merge(model, adapter())
    pairs = zip(jax.tree.leaves(merged), jax.tree.leaves(model), strict=True)
    assert all(one.sharding == two.sharding for one, two in pairs)
    draft = Draft("flux-dev")
    KINDS["diff"][0](draft, "lora_unet_img_in", "transformer:x_embedder")
    applied = lora.apply(model, [adapter(), draft.adapter()])
    spec = model.x_embedder.weight.sharding.spec
    assert tuple(applied.x_embedder.change.sharding.spec) == (None, *spec)


def test_any_pytree_can_have_adapters():
    """A model of no family goes by its own paths, here with an adapter from PEFT."""

    class Tower(eqx.Module):
        first: Linear
        layers: tuple[Linear, ...]

        def __call__(self, x):
            x = self.first(x)
            for layer in self.layers:
                x = x + jnp.tanh(layer(x))
            return x

    keys = jax.random.split(jax.random.key(0), 3)
    tower = Tower(*(lambda f, *rest: (f, tuple(rest)))(*(
        Linear.init(8, 8, key=key) for key in keys)))  # fmt: skip
    down, up = noise("down", 2, 8), noise("up", 8, 2)
    stem = "base_model.model.layers.1"
    file = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    one = lora.parse_adapter(InMemory(file), name="tower")
    merged = lora.merge(tower, one)
    assert relative_error(merged.layers[1].weight, tower.layers[1].weight + up @ down) < 1e-6
    applied, x = lora.apply(tower, one), jnp.asarray(noise("x", 8))
    assert isinstance(applied.layers[1], Adapted)
    assert relative_error(applied(x), merged(x)) < 1e-6


def test_a_dictionary_of_components_is_a_model_too():
    """And a component that an adapter is not for stays as it is."""
    draft = Draft("flux-dev")
    FORMATS["kohya-flux"][2](draft)
    modules = components("flux-dev")
    fitted = lora.fit(modules, draft.adapter())
    only = lora.merge_fitted({"transformer": modules["transformer"]}, fitted)
    assert eqx.tree_equal(only["transformer"], lora.merge(modules, draft.adapter())["transformer"])
