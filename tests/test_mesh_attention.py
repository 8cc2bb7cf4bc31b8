"""Attention on meshes of fake devices: as on one device, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled_fast, fake_noise, relative_error
from jax.sharding import NamedSharding, PartitionSpec as P

from eqxdiff.kernels import attention
from eqxdiff.kernels._mesh import context_form
from eqxdiff.sharding import on_mesh, parse_mesh


@pytest.fixture(scope="module", autouse=True)
def level():
    with compiled_fast():
        yield


CASES = {  # the mesh; queries, keys, heads, heads of keys; and what hides or favours keys
    "ulysses": ("data=2,context=4", (24, 24, 4, 4), None),
    "ulysses, heads padded": ("context=4", (24, 24, 7, 7), "bias"),
    "ulysses with tensor, shared keys": ("context=2,tensor=4", (24, 24, 8, 2), "length"),
    "ring": ("data=2,context=4", (24, 24, 1, 1), "bias"),
    "ring of blocks, all keys of some hidden": ("context=4", (1040, 1040, 2, 1), "length"),
    "ring of segments": ("context=4,tensor=2", (40, 40, 2, 2), "segments"),
    "to a prompt, heads padded": ("context=2,tensor=4", (24, 7, 6, 6), "mask"),
    "tokens that do not divide": ("context=4,tensor=2", (23, 23, 2, 2), "mask"),
}


def extra(kind, queries, keys, heads):
    seen = np.random.RandomState(1).rand(1, queries, keys) < 0.4
    seen[:, :, 0] = True
    number = np.arange(keys) * 3 // keys
    return {
        None: {},
        "bias": {"bias": jnp.asarray(fake_noise(heads, queries, keys))},
        "mask": {"mask": jnp.asarray(seen)},
        "length": {"key_length": jnp.asarray(keys // 3)},
        "segments": {"segments": (jnp.asarray(number[:queries]), jnp.asarray(number))},
    }[kind]


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_changes_neither_values_nor_gradients(case):
    text, (queries, keys, heads, key_heads), kind = CASES[case]
    mesh, more = parse_mesh(text), extra(kind, queries, keys, heads)
    q, k, v = (fake_noise(2, *shape, 8) for shape in ((queries, heads), *[(keys, key_heads)] * 2))
    k, v = k[::-1] + 0.1, np.sin(3 * v)

    def loss(spread, q, k, v, more):
        names = ("data", "fsdp") if spread else None
        one = lambda q, k, v: attention(q, k, v, **more, implementation="xla")
        with on_mesh(mesh if spread else None):
            out = jax.vmap(one, spmd_axis_name=names)(q, k, v)
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    (_, wanted), wanted_grads = both(False, q, k, v, more)
    place = lambda x: NamedSharding(mesh, P("data"))
    (_, out), grads = both(True, *(jax.device_put(x, place(x)) for x in (q, k, v)), more)
    assert relative_error(out, wanted) < 1e-6
    for grad, other in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, other) < 2e-6


def test_the_form_follows_from_the_shapes():
    """FLUX.1's 24 heads and most of SDXL's take Ulysses; the autoencoder's one takes the ring."""
    assert context_form(4608, 4608, 24, 8) == "ulysses"
    assert context_form(1024, 1024, 10, 4) == "ulysses"  # of 12 heads, two are padding
    assert context_form(4096, 4096, 10, 8) == "ring"
    assert context_form(16384, 16384, 1, 2) == "ring"
    assert context_form(4096, 77, 10, 4) == "queries"
    assert context_form(4095, 4095, 10, 4) is None
    assert context_form(4608, 4608, 24, 1) is None
