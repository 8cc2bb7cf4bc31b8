import contextlib
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for norms, softmax, angles and sums: float32, or float64 where the input is."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def float32_products(dtype: DTypeLike) -> AbstractContextManager[None]:
    """Makes products of float32 float32 on every device, where `dtype`, the compute dtype, is wide.

    Without it GPUs and TPUs multiply in less. It is entered in what is traced.
    """
    wide = jnp.dtype(dtype).itemsize >= 4
    return jax.default_matmul_precision("highest") if wide else contextlib.nullcontext()
