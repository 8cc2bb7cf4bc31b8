"""Attention on meshes of fake devices: as on one device, and with which transfers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fake_noise, relative_error
from jax.sharding import NamedSharding, PartitionSpec as P

from eqxdiff.kernels import attention
from eqxdiff.sharding import make_mesh, on_mesh


def arrays(queries, keys, heads, dim, extra):
    q, k, v = (
        fake_noise(2, n, heads, dim)[:, ::step] for n, step in ((queries, 1), (keys, 1), (keys, 1))
    )
    k, v = k[::-1] + 0.1, v * 0.5 - k
    seen = np.random.RandomState(1).rand(1, queries, keys) < 0.4
    seen[:, :, 0] = True
    more = {
        "none": {},
        "bias": {"bias": fake_noise(heads, queries, keys)},
        "mask": {"mask": seen},
        "length": {"mask": np.arange(keys)[None, None] < keys // 3},
    }[extra]
    return (q, k, v), {name: jnp.asarray(x) for name, x in more.items()}


CASES = {
    "ulysses": (dict(data=2, context=4), (24, 24, 4, 8), "none"),
    "ulysses with a bias, heads padded": (dict(context=4), (24, 24, 7, 8), "bias"),
    "ulysses with tensor": (dict(context=2, tensor=4), (24, 24, 8, 8), "length"),
    "ring": (dict(data=2, context=4), (24, 24, 1, 8), "none"),
    "ring with a bias": (dict(context=8), (24, 24, 3, 8), "bias"),
    "ring with a mask, blocks hidden": (dict(context=4), (40, 40, 1, 8), "length"),
    "ring with any mask": (dict(context=4), (600 * 4, 600 * 4, 1, 4), "mask"),
    "to a prompt": (dict(context=4, tensor=2), (24, 7, 4, 8), "length"),
    "heads padded": (dict(data=2, tensor=4), (24, 7, 6, 8), "bias"),
    "tokens that do not divide": (dict(context=4, tensor=2), (23, 23, 2, 8), "mask"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_changes_neither_values_nor_gradients(case):
    sizes, shape, extra = CASES[case]
    mesh = make_mesh(**sizes)
    qkv, more = arrays(*shape, extra)

    def loss(spread, q, k, v, more):
        names = ("data", "fsdp") if spread else None
        one = lambda q, k, v: attention(q, k, v, **more)
        with on_mesh(mesh if spread else None):
            out = jax.vmap(one, spmd_axis_name=names)(q, k, v)
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    (_, wanted), wanted_grads = both(False, *qkv, more)
    place = NamedSharding(
        mesh, P("data", "context" if shape[0] % sizes.get("context", 1) == 0 else None)
    )
    spread = [
        jax.device_put(x, place if x.shape[1] == shape[0] else NamedSharding(mesh, P("data")))
        for x in qkv
    ]
    (_, out), grads = both(True, *spread, more)
    assert relative_error(out, wanted) < 1e-6
    for grad, other in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, other) < 2e-6
