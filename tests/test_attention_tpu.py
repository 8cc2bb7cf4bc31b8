"""The TPU kernel of attention: its values where it is interpreted, and programs for TPUs."""

import dataclasses
import functools
import importlib.util

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqxdiff.kernels import attending, attention, choose_attention
from eqxdiff.models.flux1 import Transformer, TransformerConfig, positions
from eqxdiff.sharding import make_mesh, on_mesh


V6E, V5E = "TPU v6 lite", "TPU v5 lite"
KINDS = {"v4:2x2x1": "TPU v4", "v5e:1x1": V5E, "v5p:2x2x1": "TPU v5", "v6e:1x1": V6E}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A class of shapes that models have, small enough to interpret."""

    queries: int
    keys: int
    heads: int
    dim: int
    key_heads: int = 0
    bias: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    segments: bool = False
    blocks: tuple[int, int] | None = None
    batch: int = 1
    bounded: bool = False


SHAPES = {
    "flux": Shape(512, 1024, 2, 128),
    "flux bounded": Shape(512, 1024, 2, 128, bounded=True),
    "flux in blocks": Shape(384, 600, 1, 128, blocks=(128, 256)),
    "sdxl": Shape(300, 1100, 4, 64, batch=2),
    "sdxl cross": Shape(200, 77, 2, 64),
    "sd2, odd heads in blocks": Shape(300, 600, 3, 64, blocks=(128, 256)),
    "sd1 40": Shape(200, 300, 2, 40, batch=2, lengths=(200, 3), blocks=(128, 128)),
    "sd1 80": Shape(200, 300, 2, 80, batch=2, segments=True),
    "sd1 160": Shape(200, 300, 2, 160),
    "vae": Shape(300, 1200, 1, 512, blocks=(128, 512)),
    "t5": Shape(200, 200, 2, 64, bias=(1, 2, 200, 200)),
    "t5 masked": Shape(130, 140, 3, 64, batch=2, bias=(2, 3, 1, 140), lengths=(140, 40)),
    "clip": Shape(77, 77, 4, 64, bias=(1, 1, 77, 77)),
    "qwen3": Shape(256, 256, 4, 128, key_heads=1, lengths=(200,), blocks=(128, 128)),
    "one key": Shape(5, 1, 2, 16),
}


def draw(shape: Shape, dtype) -> tuple[list, dict]:
    rng = np.random.RandomState(shape.queries + shape.keys)
    normal = lambda *sizes: jnp.asarray(rng.standard_normal((shape.batch, *sizes)), dtype)
    keys = shape.keys, shape.key_heads or shape.heads, shape.dim
    arrays = [normal(shape.queries, shape.heads, shape.dim), normal(*keys), normal(*keys)]
    given = {}
    if shape.bias:
        bias = 3 * rng.standard_normal(shape.bias)
        if shape.queries == shape.keys and shape.bias[1] == 1:  # causal
            bias = np.where(np.tri(shape.keys, dtype=bool), bias, -1e30)
        bias = np.broadcast_to(bias, (shape.batch, *shape.bias[1:]))
        given["bias"] = jnp.asarray(bias, jnp.float32)
    if shape.lengths:
        given["key_length"] = jnp.asarray(shape.lengths)
    if shape.segments:
        numbers = lambda n: jnp.asarray(np.arange(n) * 3 // n) + jnp.zeros((shape.batch, 1), int)
        given["segments"] = numbers(shape.queries), numbers(shape.keys)
    return arrays, given


def define(q, k, v, bias=None, key_length=None, segments=None):
    """The definition for one example, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + np.asarray(bias, np.float64)
    hidden = np.zeros(scores.shape[1:], bool)
    if key_length is not None:
        hidden |= np.arange(len(k)) >= key_length
    if segments is not None:
        hidden |= np.asarray(segments[0])[:, None] != np.asarray(segments[1])
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)


def interpreted(device: str = V6E, **more):
    choice = dataclasses.replace(choose_attention(), interpret=True, device=device, **more)
    return attending(choice)


def compute(shape: Shape, arrays, given, device: str = V6E):
    call = functools.partial(attention, implementation="pallas_tpu", bounded=shape.bounded)
    with interpreted(device, blocks=shape.blocks):
        return jax.jit(jax.vmap(lambda qkv, given: call(*qkv, **given)))(arrays, given)


def check(shape: Shape, dtype, device: str = V6E):
    arrays, given = draw(shape, dtype)
    out = compute(shape, arrays, given, device)
    example = lambda i: jax.tree.map(lambda x: x[i], (arrays, given))
    wanted = [define(*qkv, **given) for qkv, given in map(example, range(shape.batch))]
    assert out.dtype == dtype
    assert relative_error(out, np.stack(wanted)) < (1e-6 if dtype == jnp.float32 else 3e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_values(name):
    """Keys and queries beyond the last ones are not numbers here, as they may be on a TPU."""
    check(SHAPES[name], jnp.float32)


@pytest.mark.parametrize(
    ("name", "device"), [("flux in blocks", V6E), ("sdxl cross", V6E), ("sdxl cross", V5E)]
)
def test_half_precision_rounds_weights_and_result_alone(name, device):
    """Not `scale * q`, in both of the ways to multiply by the scale."""
    check(SHAPES[name], jnp.bfloat16, device)


def test_bounded_scores_reach_64_and_no_maximum_is_taken():
    shape = dataclasses.replace(SHAPES["flux bounded"], queries=128, keys=256)
    (q, k, v), _ = draw(shape, jnp.float32)
    highest = np.abs(np.einsum("bqhd,bkhd->bhqk", q, k)).max() * shape.dim**-0.5
    out = compute(shape, [q * (64 / highest), k, v], {})
    assert relative_error(out[0], define(q[0] * (64 / highest), k[0], v[0])) < 5e-6
    assert not np.all(np.isfinite(compute(shape, [q * (200 / highest), k, v], {})))


def test_large_scores_do_not_overflow():
    shape = SHAPES["flux in blocks"]
    (q, k, v), _ = draw(shape, jnp.float32)
    k = k * jnp.linspace(0, 60, shape.keys)[:, None, None]
    out = compute(shape, [q, k, v], {})
    assert relative_error(out[0], define(q[0], k[0], v[0])) < 5e-6


def test_gradients_are_those_of_the_definition():
    shape = SHAPES["t5 masked"]
    (q, k, v), given = draw(shape, jnp.float32)
    one = jax.tree.map(lambda x: x[0], (q, k, v, given["bias"]))

    def loss(arrays, implementation):
        *qkv, bias = arrays
        out = attention(*qkv, bias=bias, implementation=implementation)
        return jnp.sum(out * jnp.linspace(0, 1, out.size).reshape(out.shape))

    with interpreted():
        wanted, got = (
            jax.jit(jax.grad(loss), static_argnums=1)(one, n) for n in ("xla", "pallas_tpu")
        )
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < 5e-6


def test_heads_and_batch_are_split_over_devices():
    shape = dataclasses.replace(SHAPES["t5"], queries=130, keys=140, heads=8, batch=2, bias=())
    mesh = make_mesh(data=2, tensor=4)
    (q, k, v), _ = draw(shape, jnp.float32)
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    arrays = [jax.device_put(x, place) for x in (q, k, v)]
    one = lambda *qkv: attention(*qkv, implementation="pallas_tpu")
    with interpreted(mesh=mesh), on_mesh(mesh):
        out = jax.jit(jax.vmap(one, spmd_axis_name=("data", "fsdp")))(*arrays)
    assert out.sharding.is_equivalent_to(place, out.ndim)
    assert relative_error(out[1], define(q[1], k[1], v[1])) < 1e-6


def test_other_dtypes_are_refused():
    x = jax.ShapeDtypeStruct((8, 2, 16), jnp.float16)
    with pytest.raises(NotImplementedError, match="bfloat16 and float32, not float16"):
        jax.eval_shape(functools.partial(attention, implementation="pallas_tpu"), x, x, x)


@pytest.fixture(scope="module")
def topology():
    """Returns one device of a TPU that is not there, for the compiler alone."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs needs libtpu")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            patch.setenv(name, "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("TPU_WORKER_ID", "0")

        def first(name: str):
            one = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith("1x1") else {}
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **one)
            return Mesh(np.array(devices.devices[:1]), ("data",))

        yield first


def lower(function, mesh: Mesh, device: str, *arrays):
    """Compiles a program that takes arrays of these shapes on the device of a mesh."""
    place = NamedSharding(mesh, PartitionSpec())
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    choice = dataclasses.replace(
        choose_attention(mesh=mesh), backends=("pallas_tpu",), chosen=True, device=device
    )
    with attending(choice) as used, on_mesh(mesh):
        compiled = jax.jit(function).lower(*jax.tree.map(put, arrays)).compile()
    return compiled.as_text(), used


@pytest.mark.parametrize("topology_name", KINDS)
def test_compiles_for_every_generation(topology, topology_name):
    """FLUX's heads, in several blocks of keys, and SDXL's with the keys of a prompt."""

    def both(flux, sdxl):
        return [jax.vmap(attention)(*each) for each in (flux, sdxl)]

    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    flux = [array(1, n, 2, 128) for n in (1024, 1100, 1100)]
    sdxl = [array(2, n, 10, 64) for n in (256, 77, 77)]
    text, _ = lower(both, topology(topology_name), KINDS[topology_name], flux, sdxl)
    assert text.count('custom_call_target="tpu_custom_call"') == 2


def test_a_flux_network_compiles_with_the_kernel(topology):
    config = TransformerConfig(
        attention_head_dim=128,
        axes_dims_rope=(16, 56, 56),
        in_channels=64,
        joint_attention_dim=128,
        num_attention_heads=2,
        num_layers=2,
        num_single_layers=2,
        pooled_projection_dim=128,
    )
    init = lambda: Transformer.init(config, key=jax.random.key(0), dtype=jnp.bfloat16)
    arrays, static = eqx.partition(
        eqx.filter_eval_shape(init), lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )
    half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    number = jax.ShapeDtypeStruct((), jnp.float32)

    def call(arrays, img, txt, pooled, timestep):
        network = eqx.combine(arrays, static)
        return network(img, txt, pooled, timestep, None, positions(64, 32, 32))

    inputs = arrays, half(256, 64), half(64, 128), half(128), number
    text, used = lower(call, topology("v6e:1x1"), V6E, *inputs)
    assert used == {"320x2x128": "pallas_tpu"}
    assert text.count('custom_call_target="tpu_custom_call"') == 2
