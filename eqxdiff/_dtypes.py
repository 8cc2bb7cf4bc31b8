import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for norms, softmax, angles and sums: float32, or float64 where the input is."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)
