"""Adapter files that do not fit, are damaged or are hostile; and strengths."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import read_manifest
from lora_files import FORMATS, UNET, Draft, components, flat, noise, realized
from test_layout import wanted

from eqxdiff import lora
from eqxdiff._errors import CheckpointError, SettingError, SourceError
from eqxdiff.nn import Conv2d, Embedding, LayerNorm, Linear
from eqxdiff.tensors import InMemory


STEM = f"lora_unet_{flat(UNET[0])}"


def unet_draft() -> Draft:
    draft = Draft("sd15")
    draft.lora(STEM, UNET[0], alpha=1)
    return draft


def refused(draft: Draft) -> str:
    with pytest.raises(CheckpointError) as caught:
        lora.fit(components(draft.model), draft.adapter())
    return str(caught.value)


def test_every_tensor_that_cannot_be_applied_is_listed():
    draft = unet_draft()
    draft.file["lora_unet_down_blocks_9_resnets_0_conv1.lora_down.weight"] = noise("a", 2, 32)
    draft.file["lora_unet_down_blocks_9_resnets_0_conv1.lora_up.weight"] = noise("b", 32, 2)
    draft.file["nobody.knows.this"] = noise("c", 3)
    draft.file["lora_unet_conv_in.alpha"] = np.ones((), np.float32)
    said = refused(draft)
    assert "tiny.safetensors: 4 of 7 tensors cannot be applied" in said
    assert "down_blocks_9_resnets_0_conv1.* (2 tensors) is for a module that the model does" in said
    assert "nobody.knows.this is no tensor of an adapter" in said
    assert "lora_unet_conv_in.alpha belongs to tensors that are missing" in said


def test_partial_accepts_and_reports():
    draft = unet_draft()
    draft.file["nobody.knows.this"] = noise("c", 3)
    (report,) = lora.fit(components("sd15"), draft.adapter(), partial=True).reports
    assert report.unused == {"nobody.knows.this": "is no tensor of an adapter"}
    assert dict(report.layers) == {"unet": 1}
    assert "changes layers: 1 of unet; 1 tensors are not applied" in str(report)


@pytest.mark.parametrize("partial", [False, True])
def test_an_adapter_that_fits_nothing_is_always_an_error(partial):
    draft = Draft("flux-dev")
    FORMATS["diffusers-flux"][2](draft)
    unet = {"unet": components("sd15")["unet"]}
    with pytest.raises(CheckpointError, match="fits nothing in this model"):
        lora.fit(unet, draft.adapter(), partial=partial)


def test_an_adapter_for_another_size_says_both_shapes():
    draft = unet_draft()
    draft.file[f"{STEM}.lora_down.weight"] = noise("wide", 3, 320)
    assert f"changes a weight of (32, 320), which in the model is {draft.shape(UNET[0])}" in (
        refused(draft)
    )


def test_one_layer_cannot_be_changed_in_two_ways():
    draft = Draft("sdxl")
    FORMATS["kohya-both-layouts"][2](draft)
    name = next(name for name in draft.file if "down_blocks" in name and "lora_up" in name)
    draft.file[name] = draft.file[name] * 2
    assert "changes the same layer as lora_unet_input_blocks" in refused(draft)


BROKEN = {
    "differ in their rank": {".lora_up.weight": noise("a", 32, 5)},
    "is of no known kind (down)": {".lora_up.weight": None},
    "has an alpha that is not one number": {".alpha": np.ones(2, np.float32)},
    "is empty": {".lora_down.weight": np.ones((0, 32), np.float32)},
    "holds int32 numbers": {".lora_down.weight": np.ones((3, 32), np.int32)},
    "is of no known kind (down, hada_w1_a, up)": {".hada_w1_a": noise("a", 32, 2)},
    "is of no known kind (a1, down, up)": {".a1.weight": noise("a", 32, 2)},
    "magnitudes of (7,)": {".dora_scale": noise("a", 7)},
    "a kernel of its own": {".lora_up.weight": noise("a", 32, 3, 3, 3)},
    "changes a bias of (5,)": {".lora_up.bias": noise("a", 5)},
}


@pytest.mark.parametrize("why", BROKEN)
def test_tensors_that_do_not_belong_together_are_refused(why):
    draft = unet_draft()
    for ending, tensor in BROKEN[why].items():
        if tensor is None:
            draft.file.pop(STEM + ending)
        else:
            draft.file[STEM + ending] = tensor
    assert why in refused(draft)


def test_a_product_larger_than_the_weight_is_refused_before_it_is_made():
    """A Kronecker product of small tensors may be larger than any memory."""
    draft = Draft("sd15")
    draft.file[f"{STEM}.lokr_w1"] = np.ones((1, 2_000_000), np.float32)
    draft.file[f"{STEM}.lokr_w2"] = np.ones((2_000_000, 1), np.float32)
    assert "changes a weight of (2000000, 2000000)" in refused(draft)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("ending", [".lora_down.weight", ".alpha"])
def test_numbers_that_are_not_finite_are_refused(value, ending):
    draft = unet_draft()
    draft.file[STEM + ending] = np.full_like(draft.file[STEM + ending], value)
    with pytest.raises(CheckpointError, match="not finite"):
        draft.adapter()


def test_a_checkpoint_is_no_adapter():
    with pytest.raises(CheckpointError, match="is not a LoRA or one of its relatives"):
        lora.parse_adapter(InMemory({"model.weight": np.ones(3, np.float32)}), name="x")
    with pytest.raises(CheckpointError, match="it has no tensors"):
        lora.parse_adapter(InMemory({}), name="x")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_damaged_metadata_is_refused(text):
    draft = unet_draft()
    draft.metadata["lora_adapter_metadata"] = text
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        draft.adapter()


# --- strengths ---


@pytest.mark.parametrize(
    ("spec", "source", "at"),
    [
        ("a.safetensors", "a.safetensors", {"unet.x": 1, "text_encoder.x": 1}),
        ("a.safetensors@0.8", "a.safetensors", {"unet.x": 0.8, "text_encoder.x": 0.8}),
        ("a@b/c.safetensors@-2", "a@b/c.safetensors", {"unet.x": -2}),
        ("a@b/c.safetensors", "a@b/c.safetensors", {"unet.x": 1}),
        ("o/r:f.safetensors@unet=0.5", "o/r:f.safetensors", {"unet.x": 0.5, "text_encoder.x": 1}),
        (
            "a@0.5,unet.down_blocks.1=2",
            "a",
            {"unet.down_blocks.1.y": 2, "unet.down_blocks.10": 0.5},
        ),
        ("a@1,unet.**.attn2=0", "a", {"unet.a.b.attn2.to_q": 0, "unet.a.attn1.to_q": 1}),
        ("a@1,*.a=0,unet.a.b=3", "a", {"unet.a.c": 0, "unet.a.b": 3, "unet.x.a": 1}),
        (r"C:\style.safetensors@1e-1", r"C:\style.safetensors", {"unet.x": 0.1}),
    ],
)
def test_a_spec_is_a_file_and_its_strength(spec, source, at):
    name, strength = lora.split_spec(spec)
    assert name == source
    assert {path: strength.at(path) for path in at} == at


@pytest.mark.parametrize("text", ["0.5,0.7", "unet=x", "=0.5", "nan", "unet=inf", "0.5,unet"])
def test_what_is_no_strength_is_refused(text):
    with pytest.raises(SettingError, match="scale"):
        lora.Strength.parse(text)


def test_a_strength_for_what_is_not_touched_is_an_error():
    one = unet_draft().adapter().scaled("1,text_encoder=0.5")
    with pytest.raises(SettingError, match="touches nothing called 'text_encoder', only parts of"):
        lora.fit(components("sd15"), one)


# --- where files come from ---


def test_a_file_or_its_folder_is_read(tmp_path):
    draft = unet_draft()
    path = tmp_path / "style.safetensors"
    safetensors.numpy.save_file(draft.file, path)
    for spec in (path, f"{path}@0.5", tmp_path, f"{tmp_path}@unet=0.5"):
        one = lora.load(str(spec))
        assert one.strength.at("unet.x") == (0.5 if "@" in str(spec) else 1)
        assert one.name.endswith("style.safetensors")


def test_a_folder_of_peft_has_its_alpha_in_a_config(tmp_path):
    draft = Draft("sd15")
    FORMATS["peft"][2](draft)
    safetensors.numpy.save_file(draft.file, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(draft.config))
    assert {patch.alpha for patch in lora.load(str(tmp_path)).patches} == {5}


def test_the_file_must_be_clear(tmp_path):
    with pytest.raises(SourceError, match="has no safetensors file"):
        lora.load(str(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="is a pickle"):
        lora.load(str(tmp_path))
    for name in ("a", "b"):
        safetensors.numpy.save_file(unet_draft().file, tmp_path / f"{name}.safetensors")
    with pytest.raises(SourceError, match=r"several files.*: a\.safetensors, b\.safetensors"):
        lora.load(str(tmp_path))
    with pytest.raises(SourceError, match="There is no file nowhere"):
        lora.load("nowhere.safetensors@0.5")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_refused_or_read(seed, tmp_path):
    """Bytes of the header and the data changed at random: an error of ours, or an adapter."""
    draft = unet_draft()
    path = tmp_path / "style.safetensors"
    safetensors.numpy.save_file(draft.file, path, {"ss_network_alpha": "1"})
    data, random = bytearray(path.read_bytes()), np.random.RandomState(seed)
    for at in random.randint(0, len(data), 4):
        data[at] = random.randint(256)
    path.write_bytes(data[: random.randint(1, len(data) + 1)] if seed % 4 == 0 else data)
    try:
        lora.fit(components("sd15"), lora.load(str(path)))
    except (CheckpointError, SettingError):
        pass


ENDINGS = [
    *(".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".lora_up.bias", ".alpha"),
    *(".scale", ".dora_scale", ".lora_magnitude_vector", ".diff", ".diff_b", ".set_weight"),
    *(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
    *(".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"),
    *(".reshape_weight", ".w_norm", ".b_norm", ".a1.weight", "", ".lora_A.x.weight"),
]
FITTING = [
    {".lora_down.weight": (2, 2), ".lora_up.weight": (4, 2)},
    {".hada_w1_a": (4, 2), ".hada_w1_b": (2, 2), ".hada_w2_a": (4, 1), ".hada_w2_b": (1, 2)},
    {".lokr_w1": (2, 1), ".lokr_w2": (2, 2)},
    {".diff": (4, 2), ".diff_b": (4,)},
    {},
]
"""For the linear layer of `Small`."""


class Small(eqx.Module):
    """One of each layer."""

    linear: Linear
    conv: Conv2d
    norm: LayerNorm
    table: Embedding


@pytest.fixture(scope="module")
def small():
    key = jax.random.key(0)
    return Small(
        Linear.init(2, 4, key=key),
        Conv2d.init(2, 4, 2, key=key),
        LayerNorm.init(4, eps=1e-5),
        Embedding.init(4, 2, key=key),
    )


def test_tensors_of_any_names_and_shapes_are_refused_or_applied(small):
    """At random; whatever is wrong with them is told in our own words."""
    random, applied = np.random.RandomState(0), 0
    for _ in range(500):
        layer = random.choice(["linear", "conv", "norm", "table", "lora_unet_linear", "x"])
        shapes = dict(FITTING[random.randint(len(FITTING))])
        names = [ENDINGS[i] for i in random.randint(len(ENDINGS), size=random.randint(3))]
        names += [name for name in shapes if random.rand() < 0.1]
        for name in names:
            shapes[name] = tuple(random.choice([1, 2, 2, 4], random.choice([0, 1, 2, 2, 4])))
        file = {layer + e: np.asarray(noise(e, *map(int, s))) for e, s in shapes.items()}
        try:
            adapter = lora.parse_adapter(InMemory(file), name="random")
            merged = lora.merge(small, adapter, partial=True)
            at_run_time = realized(lora.apply(small, adapter, partial=True))
        except (CheckpointError, SettingError):
            continue
        applied += 1
        for one, two in zip(jax.tree.leaves(merged), jax.tree.leaves(at_run_time), strict=True):
            assert np.allclose(one, two, rtol=1e-4, atol=1e-4), file.keys()
    assert applied > 50


# --- full-size models ---

REAL = {
    "sd15": {"lora_unet_": "unet_sd15", "lora_te_": "clip_l"},
    "sdxl": {"lora_unet_": "unet_sdxl_ldm", "lora_te1_": "clip_l", "lora_te2_": "clip_bigg"},
    "flux-dev": {"lora_unet_": "flux1_dev_bfl", "lora_te1_": "clip_l", "lora_te2_": "t5_xxl"},
}


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("sd15", {"unet": 282, "text_encoder": 72}),
        ("sdxl", {"unet": 794, "text_encoder": 72, "text_encoder_2": 193}),
        ("flux-dev", {"transformer": 504, "text_encoder": 72, "text_encoder_2": 170}),
    ],
)
def test_every_layer_of_the_real_models_is_found_under_flat_names(model, parts):
    """Names and shapes alone: the underscores of kohya's names are told apart by the model."""
    file = {}
    for prefix, manifest in REAL[model].items():
        for name, shape in read_manifest(manifest).items():
            module, _, last = name.rpartition(".")
            if last == "weight" and len(shape) > 1 and "embed" not in module.replace("_embed", ""):
                stem = prefix + module.replace(".", "_")
                file[f"{stem}.lora_down.weight"] = np.zeros((1, *shape[1:]), np.float16)
                ones = [1] * (len(shape) - 2)
                file[f"{stem}.lora_up.weight"] = np.zeros((shape[0], 1, *ones), np.float16)
    skeletons = {name: skeleton for name, (_, skeleton) in wanted(model).items()}
    adapter = lora.parse_adapter(InMemory(file), name=model)
    (report,) = lora.fit(skeletons, adapter).reports
    assert dict(report.layers) == parts
    assert len(adapter.patches) * 2 == len(file)
    assert lora.guess_base(adapter) == {"sd15": "SD 1.5", "sdxl": "SDXL"}.get(model, "FLUX.1")
