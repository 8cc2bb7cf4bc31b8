"""Attention: both of its forms against the definition in float64, and over several devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import NamedSharding, PartitionSpec

from eqxdiff.kernels import attending, attention, choose_attention
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


def test_real_pictures_take_the_chunked_form():
    """Plain up to 64 MiB of scores: FLUX and SDXL at 1024x1024 are beyond, text encoders not."""
    sizes = {"flux": (4608, 24, 128), "sdxl": (4096, 10, 64), "t5": (512, 64, 64)}
    with attending(choose_attention()) as used:
        for tokens, heads, dim in sizes.values():
            x = jax.ShapeDtypeStruct((tokens, heads, dim), jnp.bfloat16)
            jax.eval_shape(attention, x, x, x)
    assert used == {"4608x24x128": "chunked", "4096x10x64": "chunked", "512x64x64": "xla"}


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
