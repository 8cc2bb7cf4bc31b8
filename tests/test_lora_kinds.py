"""Every kind of adapter, on matrices, convolutions and norms: the change of its definition."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from lora_files import BFL, QKV, Draft, components, flat, noise, realized
from test_lora_formats import check_changes

from eqxdiff import lora
from eqxdiff.nn import Adapted, Linear


LINEAR = "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "unet:down_blocks.1.resnets.0.conv1"
ONE_BY_ONE = "unet:down_blocks.1.attentions.0.proj_in"
STRIDED = "unet:down_blocks.0.downsamplers.0.conv"
NORM = "unet:down_blocks.1.resnets.0.norm1"
FUSED = "double_blocks.1.img_attn.qkv"


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def put(draft: Draft, stem: str, **tensors: np.ndarray) -> None:
    for name, tensor in tensors.items():
        draft.file[f"{stem}.{name.replace('__', '.')}"] = np.asarray(tensor, np.float32)


def plain(draft: Draft, stem: str, target) -> None:
    draft.lora(stem, target, alpha=2)


def tucker(draft: Draft, stem: str, target) -> None:
    out, inner, *kernel = draft.shape(target)
    up, mid = noise("up", out, 3, 1, 1), noise("mid", 3, 2, *kernel)
    down = noise("down", 2, inner, 1, 1) / np.float32(np.sqrt(inner))
    put(draft, stem, lora_up__weight=up, lora_mid__weight=mid, lora_down__weight=down, alpha=1)
    delta = np.einsum("or,rskl,si->oikl", *map(wide, (up[..., 0, 0], mid, down[..., 0, 0])))
    draft.expect(target, delta / 2)


def loha(draft: Draft, stem: str, target) -> None:
    out, *rest = draft.shape(target)
    inner = int(np.prod(rest))
    w1_a, w1_b = noise("w1a", out, 2), noise("w1b", 2, inner)
    w2_a, w2_b = noise("w2a", out, 2), noise("w2b", 2, inner)
    put(draft, stem, hada_w1_a=w1_a, hada_w1_b=w1_b, hada_w2_a=w2_a, hada_w2_b=w2_b, alpha=3)
    delta = (wide(w1_a) @ wide(w1_b)) * (wide(w2_a) @ wide(w2_b))
    draft.expect(target, delta * 3 / 2)


def loha_tucker(draft: Draft, stem: str, target) -> None:
    out, inner, *kernel = draft.shape(target)
    one = noise("t1", 2, 2, *kernel), noise("w1b", 2, inner), noise("w1a", 2, out)
    two = noise("t2", 3, 3, *kernel), noise("w2b", 3, inner), noise("w2a", 3, out)
    put(draft, stem, hada_t1=one[0], hada_w1_b=one[1], hada_w1_a=one[2], alpha=1)
    put(draft, stem, hada_t2=two[0], hada_w2_b=two[1], hada_w2_a=two[2])
    part = lambda t: np.einsum("ijkl,jr,ip->prkl", *map(wide, t))
    draft.expect(target, part(one) * part(two) / 2)


def lokr(first: bool, second: bool, order: int = 4):
    """LoKr, its factors themselves factored or not."""

    def make(draft: Draft, stem: str, target) -> None:
        out, inner, *kernel = draft.shape(target)
        one, two = noise("w1", order, 2), noise("w2", out // order, inner // 2, *kernel)
        alpha, rank = 5, None
        if second:
            a, b = noise("w2a", out // order, 2), noise("w2b", 2, inner // 2 * int(np.prod(kernel)))
            put(draft, stem, lokr_w2_a=a, lokr_w2_b=b)
            two, rank = (wide(a) @ wide(b)).reshape(two.shape), 2
        else:
            put(draft, stem, lokr_w2=two)
        if first:
            a, b = noise("w1a", order, 3), noise("w1b", 3, 2)
            put(draft, stem, lokr_w1_a=a, lokr_w1_b=b)
            one, rank = wide(a) @ wide(b), 2 if second else 3
        else:
            put(draft, stem, lokr_w1=one)
        put(draft, stem, alpha=alpha)
        # the definition, block by block
        delta = np.zeros(draft.shape(target))
        rows, columns = two.shape[:2]
        for i, j in np.ndindex(order, 2):
            block = wide(one)[i, j] * wide(two)
            delta[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = block
        draft.expect(target, delta * (1 if rank is None else alpha / rank))

    return make


def lokr_tucker(draft: Draft, stem: str, target) -> None:
    out, inner, *kernel = draft.shape(target)
    one, core = noise("w1", 2, 2), noise("t2", 3, 3, *kernel)
    a, b = noise("w2a", 3, out // 2), noise("w2b", 3, inner // 2)
    put(draft, stem, lokr_w1=one, lokr_t2=core, lokr_w2_a=a, lokr_w2_b=b, alpha=6)
    two = np.einsum("ijkl,jr,ip->prkl", *map(wide, (core, b, a)))
    draft.expect(target, np.kron(wide(one)[..., None, None], two) * 2)


def diff(draft: Draft, stem: str, target) -> None:
    shape = draft.shape(target)
    weight, bias = noise("diff", *shape), noise("bias", shape[0])
    put(draft, stem, diff=weight, diff_b=bias)
    draft.expect(target, weight)
    if f"{target}.bias" in draft.shapes:
        draft.expect(target, bias, "bias")
    else:
        draft.file.pop(f"{stem}.diff_b")


def norm(draft: Draft, stem: str, target) -> None:
    (size,) = draft.shape(target)
    put(draft, stem, w_norm=noise("w", size), b_norm=noise("b", size))
    draft.expect(target, noise("w", size))
    draft.expect(target, noise("b", size), "bias")


def up_bias(draft: Draft, stem: str, target) -> None:
    """PEFT's `lora_bias`: what comes out of `lora_B` has a bias, which is scaled along."""
    draft.lora(stem, target, style="peft", alpha=1, rank=4)
    bias = noise("up bias", draft.shape(target)[0])
    put(draft, stem, lora_B__bias=bias)
    draft.expect(target, bias / 4, "bias")


def set_weight(draft: Draft, stem: str, target) -> None:
    new = noise("new", *draft.shape(target))
    put(draft, stem, set_weight=new)
    draft.expect(target, wide(new) - draft.weight(target))


def dora(by: str):
    """DoRA over the rows, or over the columns of what the file's tensor is."""

    def make(draft: Draft, stem: str, target) -> None:
        targets = [target] if isinstance(target, str) else target
        draft.lora(stem, target, alpha=2, style="peft" if by == "peft" else "kohya")
        parts = [draft.expected.pop(f"{name}.weight") for name in targets]
        weight, delta = draft.weight(target), np.concatenate(parts)
        total = (weight + delta).reshape(*weight.shape[:2], -1)
        if by == "columns":
            norms = np.sqrt((total**2).sum(axis=(0, 2)))
            size = (1, -1, *[1] * (weight.ndim - 2))
            name = "dora_scale"
        else:
            norms = np.sqrt((total**2).sum(axis=(1, 2)))
            name = "dora_scale" if by == "rows" else "lora_magnitude_vector"
            size = (-1, *[1] * (weight.ndim - 1))
        magnitude = (norms * (1 + 0.3 * noise(f"m {stem}", norms.size))).astype(np.float32)
        shape = (-1,) if by == "peft" else size
        if by == "peft" and weight.ndim == 4:
            shape = (1, -1, 1, 1)  # PEFT's own shape for convolutions: a row of outputs
        draft.file[f"{stem}.{name}"] = magnitude.reshape(shape)
        draft.expect(target, (weight + delta) * (magnitude / norms).reshape(size) - weight)

    return make


KINDS = {
    "lora": (plain, (LINEAR, CONV, ONE_BY_ONE, STRIDED)),
    "lora-tucker": (tucker, (CONV, STRIDED)),
    "loha": (loha, (LINEAR, CONV, ONE_BY_ONE)),
    "loha-tucker": (loha_tucker, (CONV,)),
    "lokr": (lokr(False, False), (LINEAR, CONV)),
    "lokr-first": (lokr(True, False), (LINEAR, CONV)),
    "lokr-second": (lokr(False, True), (LINEAR, CONV, ONE_BY_ONE)),
    "lokr-both": (lokr(True, True), (LINEAR,)),
    "lokr-tall": (lokr(False, True, order=1), (LINEAR,)),
    "lokr-tucker": (lokr_tucker, (CONV,)),
    "diff": (diff, (LINEAR, CONV, ONE_BY_ONE)),
    "norm": (norm, (NORM,)),
    "up-bias": (up_bias, (CONV, ONE_BY_ONE)),
    "set": (set_weight, (LINEAR, NORM)),
    "dora-rows": (dora("rows"), (LINEAR, CONV)),
    "dora-columns": (dora("columns"), (LINEAR, CONV, ONE_BY_ONE)),
    "dora-peft": (dora("peft"), (LINEAR, CONV)),
}
CASES = [(kind, target) for kind, (_, targets) in KINDS.items() for target in targets]


@pytest.mark.parametrize(("kind", "target"), CASES, ids=lambda x: x.rpartition(".")[2])
def test_merged_and_at_run_time_the_change_is_that_of_the_definition(kind, target):
    draft = Draft("sd15")
    KINDS[kind][0](draft, f"lora_unet_{flat(target)}", target)
    modules = {"unet": components("sd15")["unet"]}
    draft.base = {name: a for name, a in draft.base.items() if name.startswith("unet:")}
    adapter = draft.adapter()
    assert not adapter.unread
    check_changes(draft, lora.merge(modules, adapter.scaled(1.5)), 1.5)
    applied = lora.apply(modules, adapter.scaled(1.5))
    check_changes(draft, realized(applied), 1.5)
    check_layer(applied["unet"], target)


def check_layer(unet, target: str) -> None:
    """A layer computes with the weight that its fields stand for, and says so itself."""
    for path, node in lora.adapted_layers(unet):
        baked = realized(node)
        if node.scale.ndim == 2:  # one layer of a stack, as a scan sees it
            node, baked = (jax.tree.map(lambda x: x[0], n) for n in (node, baked))
        assert relative_error(node.weight, baked.weight) < 5e-7, path
        channels = node.inner.weight.shape[:2][-1]
        shape = (5, channels) if isinstance(node.inner, Linear) else (6, 6, channels)
        x = jnp.asarray(noise("x", *shape))
        assert relative_error(node(x), baked(x)) < 1e-6, path
        assert node(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr-second", "diff", "dora-rows"])
def test_a_fused_tensor_is_changed_as_a_whole(kind):
    """Query, key and value of FLUX.1 in one: a Kronecker product spans all three."""
    draft = Draft("flux-dev")
    make = lokr(kind == "x", kind == "lokr-second") if "lokr" in kind else KINDS[kind][0]
    targets = BFL[FUSED]
    if kind == "diff":
        whole = noise("diff", *draft.shape(targets))
        put(draft, "lora_unet_" + FUSED.replace(".", "_"), diff=whole)
        draft.expect(targets, whole)
    else:
        make(draft, "lora_unet_" + FUSED.replace(".", "_"), targets)
    check_flux(draft)


@pytest.mark.parametrize("by", ["columns", "rows", "peft"])
def test_the_norms_of_a_dora_span_the_fused_tensor(by):
    draft = Draft("flux-dev")
    dora(by)(draft, f"diffusion_model.{FUSED}", QKV)
    check_flux(draft)


def check_flux(draft: Draft) -> None:
    modules = {"transformer": components("flux-dev")["transformer"]}
    draft.base = {name: a for name, a in draft.base.items() if name.startswith("transformer:")}
    adapter = draft.adapter()
    check_changes(draft, lora.merge(modules, adapter))
    applied = lora.apply(modules, adapter)
    check_changes(draft, realized(applied))
    check_layer(applied["transformer"], FUSED)


def test_a_bias_can_be_given_to_a_layer_without_one():
    """The queries of a UNet have none."""
    draft = Draft("sd15")
    bias = noise("bias", draft.shape(LINEAR)[0])
    put(draft, f"lora_unet_{flat(LINEAR)}", diff_b=bias)
    unet = components("sd15")["unet"]
    layer = lambda model: model.down_blocks[1].attentions[0].transformer_blocks.attn2.to_k
    adapter = draft.adapter().scaled(0.5)
    assert layer(unet).bias is None
    assert relative_error(layer(lora.merge(unet, adapter)).bias[0], bias / 2) < 1e-7
    at_run_time = jax.tree.map(lambda x: x[0], layer(lora.apply(unet, adapter)))
    assert relative_error(at_run_time.bias, bias / 2) < 1e-7


def test_kinds_of_low_rank_stay_low_at_run_time():
    """LoHa and LoKr where factors are smaller than the matrix; what is full is kept in full."""
    ranks = {}
    for kind in ("lora", "loha", "lokr-second", "lokr", "diff"):
        draft = Draft("sd15")
        KINDS[kind][0](draft, f"lora_unet_{flat(CONV)}", CONV)
        layer = lora.apply(components("sd15")["unet"], draft.adapter()).down_blocks[1].resnets[0]
        assert isinstance(layer.conv1, Adapted)
        ranks[kind] = None if layer.conv1.up is None else layer.conv1.up.shape[-1]
    assert ranks == {"lora": 4, "loha": 4, "lokr-second": 4, "lokr": None, "diff": None}


def test_a_control_lora_widens_the_input():
    """As FLUX.1 Canny's: trained norms in full, biases, and twice the channels."""
    draft = Draft("flux-dev")
    transformer = components("flux-dev")["transformer"]
    draft.lora("double_blocks.1.img_attn.proj", BFL["double_blocks.1.img_attn.proj"], style="peft")
    bias = noise("bias", 64)
    draft.file["double_blocks.1.img_attn.proj.lora_B.bias"] = bias
    name = "transformer:transformer_blocks.1.attn.norm_q"
    draft.file["double_blocks.1.img_attn.norm.query_norm.scale"] = noise("scale", 16)
    draft.expect(name, wide(noise("scale", 16)) - draft.weight(name))
    draft.expect(BFL["double_blocks.1.img_attn.proj"], bias, "bias")
    down, up = noise("down", 3, 32), noise("up", 64, 3)
    draft.file |= {"img_in.lora_A.weight": down, "img_in.lora_B.weight": up}
    adapter = draft.adapter()
    assert adapter.format.name == "bfl-control"
    wanted = np.pad(draft.weight("transformer:x_embedder"), ((0, 0), (0, 16))) + wide(up) @ down
    for model in (
        lora.merge(transformer, adapter),
        realized(lora.apply(transformer, adapter)),
    ):
        assert relative_error(model.x_embedder.weight, wanted) < 5e-6
        rest = eqx.tree_at(lambda m: m.x_embedder, model, transformer.x_embedder)
        draft.base = {n: a for n, a in draft.base.items() if n.startswith("transformer:")}
        check_changes(draft, {"transformer": rest})
