"""Attention: all backends against the definition in float64, and over several devices."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import NamedSharding, PartitionSpec

from eqxdiff import SettingError
from eqxdiff.kernels import AttentionChoice, attending, attention, choose_attention
from eqxdiff.sharding import make_mesh


# Queries, keys, heads and head dimension; blocks are of 256 queries and 512 keys.
SIZES = {
    "even": (512, 1024, 2, 16),
    "ragged": (300, 1100, 3, 8),
    "one short": (511, 1023, 2, 8),
    "cross": (700, 77, 2, 8),
    "few queries": (5, 1030, 2, 8),
    "one query": (1, 513, 2, 8),
    "one key": (300, 1, 2, 8),
}


def draw(name: str, *shape: int) -> np.ndarray:
    seed = sum(map(ord, name)) + sum(shape)
    return np.random.RandomState(seed).standard_normal(shape)


def qkv(size, dtype=np.float32):
    queries, keys, heads, dim = size
    shapes = (queries, heads, dim), (keys, heads, dim), (keys, heads, dim)
    return [2 * draw(name, *s).astype(dtype) for name, s in zip("qkv", shapes, strict=True)]


def extra(kind: str, size, heads: bool, queries: bool):
    """A bias or a mask; each query sees some key, and the first none of the first two blocks."""
    shape = size[2] if heads else 1, size[0] if queries else 1, size[1]
    if kind == "bias":
        return {"bias": 3 * draw("bias", *shape).astype(np.float32)}
    mask = draw("mask", *shape) > 0.3
    mask[:, 0, :1024] = False
    mask[:, :, -1] = True
    return {"mask": mask}


def define(q, k, v, bias=None, mask=None, scale=None):
    """The definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)


compute = jax.jit(attention, static_argnames=("implementation", "scale"))


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("name", SIZES)
def test_values(name, implementation):
    arrays = qkv(SIZES[name])
    out = compute(*arrays, implementation=implementation)
    assert out.dtype == jnp.float32
    assert relative_error(out, define(*arrays)) < 1e-6


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize(("heads", "queries"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["bias", "mask"])
def test_values_with_a_bias_or_mask(kind, heads, queries, implementation):
    size = SIZES["ragged"]
    arrays, given = qkv(size), extra(kind, size, heads, queries)
    out = compute(*arrays, **given, scale=0.7, implementation=implementation)
    assert relative_error(out, define(*arrays, **given, scale=0.7)) < 1e-6
    assert relative_error(out, define(*arrays, scale=0.7)) > 0.01


def test_values_with_a_bias_and_a_mask():
    size = SIZES["ragged"]
    given = extra("bias", size, True, True) | extra("mask", size, False, True)
    out = compute(*qkv(size), **given, implementation="chunked")
    assert relative_error(out, define(*qkv(size), **given)) < 1e-6


def test_large_scores_do_not_overflow():
    """The maximum rises from block to block, and the first blocks count for nothing."""
    q, k, v = qkv(SIZES["ragged"])
    k = k * np.linspace(0, 60, len(k), dtype=np.float32)[:, None, None]
    wanted = define(q, k, v)
    for implementation in ("xla", "chunked"):
        assert relative_error(compute(q, k, v, implementation=implementation), wanted) < 5e-6


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_half_precision_rounds_weights_and_result_alone(implementation):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in qkv(SIZES["ragged"])]
    out = compute(*arrays, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, define(*arrays)) < 3e-3


@pytest.mark.parametrize("kind", ["bias", "mask", None])
@pytest.mark.parametrize("name", ["ragged", "cross"])
def test_gradients_are_those_of_the_definition(name, kind, x64):
    arrays = qkv(SIZES[name], np.float64)
    given = {} if kind is None else extra(kind, SIZES[name], False, True)
    bias = given.get("bias", np.zeros((1, 1, SIZES[name][1])))
    weight = draw("weight", *arrays[0].shape)
    mask = jnp.asarray(given["mask"]) if "mask" in given else None

    def loss(arrays, bias, implementation):
        out = attention(*arrays, bias=bias, mask=mask, implementation=implementation)
        return jnp.sum(out * weight)

    grads = [
        jax.jit(jax.grad(functools.partial(loss, implementation=one), argnums=(0, 1)))(arrays, bias)
        for one in ("xla", "chunked")
    ]
    for wanted, got in zip(*map(jax.tree.leaves, grads), strict=True):
        if np.any(wanted):  # with one key the softmax does not depend on it
            assert relative_error(got, wanted) < 1e-12


def test_the_gradient_of_few_scores_is_kept():
    """Forwards and backwards no array is as large as the scores, nor a mask expanded to them."""
    size = 1024, 2048, 4, 8
    arrays = [jnp.asarray(x) for x in qkv(size)]
    mask = jnp.asarray(extra("mask", size, False, True)["mask"])
    loss = lambda arrays, mask: jnp.sum(attention(*arrays, mask=mask, implementation="chunked"))
    compiled = jax.jit(jax.grad(loss)).lower(arrays, mask).compile()
    shapes = re.findall(r"\b(?:f32|pred)\[([\d,]+)\]", compiled.as_text())
    largest = max(int(np.prod([int(n) for n in shape.split(",")])) for shape in set(shapes))
    assert largest <= size[0] * size[1]  # the mask itself; the scores are four times as many


# --- the shapes of the models, shorter, on every backend ---


class Case(NamedTuple):
    """A shape class: heads, kinds and head dimensions are the model's, lengths are shorter."""

    queries: int
    keys: int
    heads: int
    dim: int
    key_heads: int = 0
    kind: str = ""


SHAPES = {
    "FLUX": Case(288, 288, 2, 128),
    "SDXL": Case(256, 256, 2, 64),
    "SDXL to the prompt": Case(96, 77, 2, 64),
    "SD1.5, 40": Case(64, 64, 2, 40),
    "SD1.5, 80 to the prompt": Case(64, 77, 2, 80),
    "SD1.5, 160": Case(64, 64, 2, 160),
    "SD2, 144 tokens": Case(144, 144, 2, 64),
    "VAE": Case(64, 64, 1, 512),
    "T5": Case(48, 48, 3, 64, kind="bias"),
    "CLIP": Case(77, 77, 2, 64, kind="causal"),
    "Qwen3": Case(80, 80, 4, 128, 2, "causal length"),
    "two prompts in one": Case(70, 70, 2, 32, kind="segments"),
}
CHOICES = {
    "xla": choose_attention("xla"),
    "chunked": choose_attention("chunked"),
    "chunked, small": choose_attention("chunked", (40, 56)),
    "pallas_gpu": AttentionChoice(("pallas_gpu",), True, interpret=True),
    "pallas_gpu, small": AttentionChoice(("pallas_gpu",), True, (32, 16), interpret=True),
}


def arrays_of(case: Case):
    """Two examples of q, k, v and the cotangent, the bias they share, the mask and the rest."""
    queries, keys, heads, dim, key_heads, kind = case
    given: dict = {}
    seen = np.ones((queries, keys), bool)
    if "bias" in kind:
        given["bias"] = 3 * draw("bias", heads, queries, keys).astype(np.float32)
    if "causal" in kind:
        seen &= np.tri(queries, keys, dtype=bool)
        given["mask"] = seen[None]
    if "length" in kind:
        given["key_length"] = np.int32(keys - 21)
        seen = seen & (np.arange(keys) < keys - 21)
    if "segments" in kind:
        ids = np.arange(queries) * 2 // queries, np.arange(keys) * 3 // keys // 2
        given["segments"] = tuple(np.int32(x) for x in ids)
        seen &= ids[0][:, None] == ids[1]
    shapes = (queries, heads), (keys, key_heads or heads), (keys, key_heads or heads)
    qkv = [draw(n, 2, *s, dim).astype(np.float32) for n, s in zip("qkv", shapes, strict=True)]
    cotangent = draw("cotangent", 2, queries, heads, dim).astype(np.float32)
    return qkv, cotangent, given, seen


def define_all(q, k, v, cotangent, bias, seen):
    """The attention of one example and its gradients for q, k, v and the bias, in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    shared, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    wide = [np.repeat(x, shared, axis=1) for x in (k, v)]
    scores = np.einsum("qhd,khd->hqk", q, wide[0]) * scale + (0 if bias is None else bias)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, wide[1])
    dw = np.einsum("qhd,khd->hqk", g, wide[1])
    ds = weights * (dw - np.sum(dw * weights, axis=-1, keepdims=True))
    dq = np.einsum("hqk,khd->qhd", ds, wide[0]) * scale
    dk, dv = np.einsum("hqk,qhd->khd", ds, q) * scale, np.einsum("hqk,qhd->khd", weights, g)
    dk, dv = (x.reshape(*k.shape[:2], shared, -1).sum(axis=2) for x in (dk, dv))
    return out, dq, dk, dv, ds


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_backend_at_the_shapes_of_the_models(name, choice):
    """Values and gradients of two examples by `vmap`, which the backends see as one batch."""
    case = SHAPES[name]
    qkv, cotangent, given, seen = arrays_of(case)
    others = {key: jax.tree.map(jnp.asarray, value) for key, value in given.items()}
    bias = others.pop("bias", None)

    @jax.jit
    def both(qkv, bias, cotangent):
        def call(qkv, bias):
            one = lambda q, k, v: attention(q, k, v, bias=bias, **others)
            return jax.vmap(one, spmd_axis_name=("data", "fsdp"))(*qkv)

        out, pull = jax.vjp(call, qkv, bias)
        return out, pull(cotangent)

    with attending(CHOICES[choice]) as used:
        out, (grads, bias_grad) = both([jnp.asarray(x) for x in qkv], bias, cotangent)
    assert list(used.values()) == [choice.split(",")[0]]
    wanted = [
        define_all(*(x[i] for x in qkv), cotangent[i], given.get("bias"), seen) for i in (0, 1)
    ]
    for got, *want in zip((out, *grads), *wanted, strict=False):
        assert relative_error(got, np.stack(want)) < 2e-6
    if bias is not None:
        assert relative_error(bias_grad, wanted[0][4] + wanted[1][4]) < 2e-6


def test_a_length_is_traced_and_may_differ_in_a_batch():
    """Under two vmaps, over all devices, the lengths of the outer and the bias of the inner."""
    q, k, v = (jnp.asarray(draw(n, 2, 3, 40, 8, 16).astype(np.float32)) for n in "qkv")
    bias = jnp.asarray(draw("bias", 3, 1, 1, 40).astype(np.float32))
    lengths = jnp.asarray([7, 40])
    one = lambda q, k, v, bias, n: attention(q, k, v, bias=bias, key_length=n)
    inner = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
    outer = jax.jit(jax.vmap(inner, in_axes=(0, 0, 0, None, 0), spmd_axis_name=("data", "fsdp")))
    for mesh in (None, make_mesh(data=2, tensor=4)):
        with attending(choose_attention("chunked", (16, 16), mesh=mesh)):
            out = outer(q, k, v, bias, lengths)
        for i in (0, 1):
            n = int(lengths[i])
            for j in range(3):
                cut = q[i, j], k[i, j, :n], v[i, j, :n]
                assert relative_error(out[i, j], define(*cut, bias=bias[j, ..., :n])) < 1e-6


def test_chunked_attention_has_derivatives_of_all_kinds(x64):
    """Forwards, backwards and of higher order, and by `vmap` of a gradient."""
    q, k, v = (jnp.asarray(draw(n, 2, 30, 2, 8)) for n in "qkv")

    def of(name):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention(q, k, v)))

        with attending(choose_attention(name, (16, 16))):
            forwards = jax.jvp(lambda q: jax.vmap(attention)(q, k, v), (q,), (jnp.cos(q),))[1]
            each = jax.vmap(jax.grad(loss))(q, k, v)
            second = jax.grad(lambda q: jnp.sum(jnp.cos(jax.grad(loss)(q, k[0], v[0]))))(q[0])
        return forwards, each, second

    for got, want in zip(of("chunked"), of("xla"), strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["SD1.5, 40", "VAE", "T5", "Qwen3", "two prompts in one"])
def test_the_kernel_for_gpus_is_lowered_without_one(name, dtype):
    qkv, _, given, _ = arrays_of(SHAPES[name])
    choice = AttentionChoice(("pallas_gpu",), True, platform="gpu", device="NVIDIA H200")
    call = jax.vmap(lambda q, k, v: attention(q, k, v, **jax.tree.map(jnp.asarray, given)))
    with attending(choice):
        traced = jax.jit(call).trace(*(jnp.asarray(x, dtype) for x in qkv))
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_backends_refuse_with_the_reason():
    x = jnp.zeros((8, 1, 520), jnp.bfloat16)
    reasons = {
        ("cudnn", jnp.float32, 64): "not in float32",
        ("cudnn", jnp.bfloat16, 260): "a multiple of 8 up to 256",
        ("cudnn", jnp.bfloat16, 64): "cuDNN is not detected",
        ("pallas_gpu", jnp.bfloat16, 520): "up to 512 dimensions",
        ("pallas_gpu", jnp.bfloat16, 64): "needs a GPU",
    }
    for (name, dtype, dim), reason in reasons.items():
        part = x[..., :dim].astype(dtype)
        with pytest.raises(NotImplementedError, match=reason):
            attention(part, part, part, implementation=name)
    ids = jnp.zeros(8, jnp.int32)
    part = x[..., :64]
    with pytest.raises(NotImplementedError, match="segments"):
        attention(part, part, part, segments=(ids, ids), implementation="cudnn")


def test_what_one_backend_refuses_the_next_one_computes():
    """As on a GPU: cuDNN is not there, the kernel takes FLUX, and no kernel the heads of 520."""
    choice = AttentionChoice(("cudnn", "pallas_gpu", "chunked"), interpret=True)
    with attending(choice) as used:
        for tokens, dim in ((2048, 128), (2048, 520), (64, 64)):
            x = jax.ShapeDtypeStruct((tokens, 2, dim), jnp.bfloat16)
            jax.eval_shape(attention, x, x, x)
    assert used == {"2048x2x128": "pallas_gpu", "2048x2x520": "chunked", "64x2x64": "xla"}


def test_real_pictures_take_the_chunked_form():
    """Plain up to 5 MiB of scores: FLUX and SDXL at 1024x1024 and T5 are beyond, CLIP is not."""
    sizes = {"flux": (4608, 24, 128), "sdxl": (4096, 10, 64), "t5": (512, 64, 64)}
    with attending(choose_attention()) as used:
        for tokens, heads, dim in (*sizes.values(), (77, 12, 64)):
            x = jax.ShapeDtypeStruct((tokens, heads, dim), jnp.bfloat16)
            jax.eval_shape(attention, x, x, x)
    names = ("4608x24x128", "4096x10x64", "512x64x64")
    assert used == {**dict.fromkeys(names, "chunked"), "77x12x64": "xla"}


def test_names_of_maxdiffusion_and_mistakes():
    assert choose_attention("dot_product").backends[0] == "xla"
    assert choose_attention("flash").backends[0] == "chunked"
    for name in ("cudnn_flash_te", "cudnn", "pallas_gpu", "pallas_tpu"):
        with pytest.raises(
            SettingError, match=f"`attention` {name} needs a .PU, and this is a CPU"
        ):
            choose_attention(name)
    with pytest.raises(SettingError, match="`attention` splash is unknown: it may be auto, xla"):
        choose_attention("splash")
    with pytest.raises(SettingError, match="`attention_blocks`"):
        choose_attention("chunked", (0, 5))


def test_scores_on_a_cpu_are_never_whole():
    """Of all heads together only a block of one head exists, forwards."""
    size = 2048, 2048, 4, 8
    arrays = [jnp.asarray(x) for x in qkv(size)]
    with attending(choose_attention()):
        compiled = jax.jit(attention).lower(*arrays).compile()
    shapes = re.findall(r"\bf32\[([\d,]+)\]", compiled.as_text())
    largest = max(int(np.prod([int(n) for n in shape.split(",")])) for shape in set(shapes))
    assert largest <= 1152**2


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_over_devices_are_not_gathered(implementation, batch):
    mesh = make_mesh(data=batch, tensor=8 // batch)
    size = 600, 1100, 8, 8
    arrays = [np.stack([x] * batch) for x in qkv(size)]
    mask = jnp.asarray(extra("mask", size, False, True)["mask"])
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    arrays = [jax.device_put(x, place) for x in arrays]
    one = lambda q, k, v: attention(q, k, v, mask=mask, implementation=implementation)
    call = jax.jit(jax.vmap(one, spmd_axis_name=("data", "fsdp")))
    text = call.lower(*arrays).compile().as_text()
    collectives = r"all-(?:gather|to-all|reduce)|collective-permute|reduce-scatter"
    assert not re.findall(collectives, text)
    out = call(*arrays)
    assert out.sharding.is_equivalent_to(place, out.ndim)
    assert relative_error(out[-1], define(*qkv(size), mask=mask)) < 1e-6
