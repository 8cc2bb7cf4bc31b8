"""Adapters merged while weights are read: the bits of a later merge, and little memory."""

import dataclasses
import tracemalloc
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec as P
from lora_files import FORMATS, QKV, Draft, components, exported, flat, noise, table_of
from test_lora_kinds import CONV, KINDS, LINEAR, put

from eqxdiff import lora
from eqxdiff._errors import CheckpointError
from eqxdiff.checkpoint import Table, load_module
from eqxdiff.lora import fitted as fitted_module
from eqxdiff.models import LoraBase, LoraFormat, LoraNames, families
from eqxdiff.nn import Linear
from eqxdiff.sharding import make_mesh, parameter_sharding
from eqxdiff.tensors import InMemory


LORA = Path(lora.__file__).parent


@pytest.fixture
def small_chunks(monkeypatch):
    """So that tiny layers are changed in several runs of rows."""
    monkeypatch.setattr(fitted_module, "CHUNK_ELEMENTS", 500)


def load_merged(model: str, component: str, adapters, dtype=jnp.float32, sharding=None):
    """A tiny component, read from its tensors with adapters merged on the way."""
    module = components(model)[component]
    skeleton = eqx.filter_eval_shape(lambda: module)
    tensors = exported(model, {component: module})
    file = {name.partition(":")[2]: array for name, array in tensors.items()}
    fitted = lora.fit({component: skeleton}, adapters, widen=False, partial=True)
    merger = lora.Merger(fitted, component)
    loaded = load_module(
        InMemory(file),
        table_of(model, component),
        skeleton,
        dtype=dtype,
        sharding=sharding,
        change=merger.change,
    )
    return merger.finish(loaded)


def assert_same(one, two) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


def check(model: str, component: str, adapters, dtype=jnp.float32, sharding=None):
    module = components(model)[component]
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), module)
    afterwards = lora.merge({component: cast}, adapters, partial=True)[component]
    assert any(
        not np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(cast), jax.tree.leaves(afterwards), strict=False)
    )
    loaded = load_merged(model, component, adapters, dtype, sharding)
    assert_same(loaded, afterwards)
    return loaded


def flux(kind: str, stem: str = "lora_unet_double_blocks_1_img_attn_qkv", targets=QKV):
    draft = Draft("flux-dev")
    KINDS[kind][0](draft, stem, targets)
    return draft.adapter()


CASES = {
    "fused": (FORMATS["kohya-flux"][2], "flux-dev", "transformer"),
    "transposed": (FORMATS["kohya-sdxl"][2], "sdxl", "text_encoder_2"),
    "convolutions": (FORMATS["kohya-sdxl"][2], "sdxl", "unet"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_merging_while_reading_gives_the_same_bits(case, dtype, small_chunks):
    make, model, component = CASES[case]
    draft = Draft(model)
    make(draft)
    adapter = draft.adapter()
    check(model, component, [adapter.scaled(0.6), adapter.scaled(-0.25)], dtype)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("norm", "up-bias")])
def test_every_kind_gives_the_same_bits(kind, small_chunks):
    """A DoRA and a replaced weight depend on the weights in the file."""
    draft = Draft("sd15")
    target = LINEAR if LINEAR in KINDS[kind][1] else CONV
    KINDS[kind][0](draft, f"lora_unet_{flat(target)}", target)
    check("sd15", "unet", [draft.adapter().scaled(0.7)], jnp.bfloat16)


@pytest.mark.parametrize("kind", ["lora", "dora-rows", "dora-columns", "set"])
def test_each_device_reads_and_changes_its_own_shard(kind, small_chunks):
    """The norms of a DoRA are those of the whole tensor, of which a device has a part."""
    mesh = make_mesh(fsdp=2, tensor=2)
    rules = families()[0].components["transformer"].rules
    place = lambda path, shape: parameter_sharding(path, shape, rules, mesh)
    extra = flux("lora", "lora_unet_single_blocks_0_linear2",
                 "transformer:single_transformer_blocks.0.proj_out")  # fmt: skip
    loaded = check("flux-dev", "transformer", [flux(kind), extra], jnp.bfloat16, place)
    weight = loaded.transformer_blocks.attn.to_q.weight
    assert len({str(shard.index) for shard in weight.addressable_shards}) == 4


def test_a_new_bias_lies_on_all_devices_of_its_weight(small_chunks):
    draft = Draft("sd15")
    put(draft, f"lora_unet_{flat(LINEAR)}", diff_b=noise("bias", draft.shape(LINEAR)[0]))
    one = NamedSharding(make_mesh(fsdp=2), P())
    unet = load_merged("sd15", "unet", draft.adapter(), sharding=one)
    bias = unet.down_blocks[1].attentions[0].transformer_blocks.attn2.to_k.bias
    assert bias.sharding == one
    assert np.array_equal(bias[0], noise("bias", draft.shape(LINEAR)[0]))


def test_a_sum_that_is_too_large_is_refused():
    draft = Draft("flux-dev")
    draft.lora("lora_unet_img_in", "transformer:x_embedder", alpha=1e6)
    with pytest.raises(CheckpointError, match=r"transformer\.x_embedder.* too large for float16"):
        load_merged("flux-dev", "transformer", draft.adapter(), jnp.float16)


# --- memory ---


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The file of a layer of 50 MB and one of an adapter of 14 MB for it, and a skeleton."""
    folder = tmp_path_factory.mktemp("large")
    noise = np.random.RandomState(0).standard_normal(4096).astype(np.float32)
    matrix = lambda *shape: np.resize(noise, shape)
    safetensors.numpy.save_file({"weight": matrix(4096, 3072)}, folder / "model.safetensors")
    file = {"lora_A.weight": matrix(512, 3072), "lora_B.weight": matrix(4096, 512)}
    safetensors.numpy.save_file(
        {f"layer.{name}": array for name, array in file.items()}, folder / "style.safetensors"
    )
    key = jax.random.key(0)
    skeleton = {
        "layer": eqx.filter_eval_shape(lambda: Linear.init(3072, 4096, bias=False, key=key))
    }
    return folder, skeleton


def test_merging_while_reading_takes_little_memory(large):
    """The adapter itself stays in its file, and changes are computed in small runs of rows."""
    folder, skeleton = large
    source = safetensors.numpy.load_file(folder / "model.safetensors")
    source = InMemory({f"layer.{name}": array for name, array in source.items()})
    tracemalloc.start()
    try:
        adapter = lora.load(str(folder / "style.safetensors@0.5"))
        fitted = lora.fit(skeleton, adapter)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        merger = lora.Merger(fitted, "model")
        load_module(source, Table("plain"), skeleton, change=merger.change)
        peak = tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
    assert held < 1e6
    matrices = 512 * (3072 + 4096) * 4
    assert peak < 3 * matrices + 8 * fitted_module.CHUNK_ELEMENTS * 4
    assert peak < 0.4 * 2 * 4096 * 3072 * 4  # a delta and the sum, in full


def test_a_file_that_has_changed_is_noticed(large, tmp_path):
    folder, skeleton = large
    file = safetensors.numpy.load_file(folder / "style.safetensors")
    path = tmp_path / "style.safetensors"
    safetensors.numpy.save_file(file, path)
    fitted = lora.fit(skeleton, lora.load(str(path)))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with open(path, "r+b") as out:
        out.write(data)
    read = lambda leaf, box: np.zeros([stop - start for start, stop in box], np.float32)
    merger = lora.Merger(fitted, "model")
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        merger.change("layer.weight", np.zeros((4096, 3072), np.float32), ((0, 4096), (0, 3072)),
                      read)  # fmt: skip


def test_an_adapter_may_be_given_by_its_name(large):
    folder, _ = large
    spec = str(folder / "style.safetensors@2")
    layer = {"layer": Linear(jnp.zeros((4096, 3072)), None)}
    assert_same(lora.merge(layer, spec), lora.merge(layer, [lora.load(spec)]))
    (path, _) = next(lora.adapted_layers(lora.apply(layer, spec)))
    assert path == "layer"


# --- the families' names ---


def test_the_room_knows_no_family():
    """Neither names of components nor names of models stand in it."""
    words = ("unet", "transformer", "text_encoder", "FLUX", "SDXL", "SD ", "xlabs", "double_blocks")
    for path in LORA.glob("*.py"):
        text = path.read_text()
        assert [word for word in words if word in text] == [], path.name


class Painter(eqx.Module):
    """A network of another family."""

    brush: Linear

    @classmethod
    def init(cls, config, *, key, dtype=jnp.float32):
        return cls(Linear.init(4, 6, bias=False, key=key, dtype=dtype))


@dataclasses.dataclass(frozen=True)
class Toy:
    """What adapters need of a family."""

    components: dict
    lora: LoraNames


def test_another_family_brings_its_own_names():
    component = dataclasses.replace(families()[0].components["transformer"], init=Painter.init)
    rewrite = (r"^easel_(\w+)/(\w+)$", r"\1.lora_\2.weight")
    names = LoraNames(
        prefixes={"painter": ("lora_paint_", "art.")},
        formats=(LoraFormat("easel", r"^easel_", (rewrite,)),),
        bases=(LoraBase("Toy", r"brush$", 4),),
    )
    toy = Toy({"painter": component}, names)
    down, up = noise("down", 2, 4), noise("up", 6, 2)
    model = {"painter": Painter.init(None, key=jax.random.key(0))}
    stems = {
        "kohya": "lora_paint_brush.lora_",
        "comfyui": "art.brush.lora_",
        "diffusers": "painter.brush.lora_",
        "easel": "easel_brush/",
    }
    for form, stem in stems.items():
        ends = ("down", "up") if form == "easel" else ("down.weight", "up.weight")
        file = dict(zip((stem + end for end in ends), (down, up), strict=True))
        adapter = lora.parse_adapter(InMemory(file), name="toy", families=[toy])
        assert adapter.format.name == form
        assert lora.guess_base(adapter, [toy]) == "Toy"
        merged = lora.merge_fitted(model, lora.fit(model, adapter, families=[toy]))
        wanted = model["painter"].brush.weight + up @ down
        assert np.allclose(merged["painter"].brush.weight, wanted, atol=1e-6), form
    assert lora.guess_base(adapter) == "unknown"


def test_a_tiny_model_is_not_taken_for_a_real_one():
    for family in families():
        assert set(family.lora.prefixes) <= set(family.components)
    adapters = {}
    for model, make in (("flux-dev", "diffusers-flux"), ("sd15", "diffusers-unet")):
        draft = Draft(model)
        FORMATS[make][2](draft)
        adapters[model] = lora.guess_base(draft.adapter())
    assert adapters == {"flux-dev": "a model like FLUX.1", "sd15": "unknown"}
