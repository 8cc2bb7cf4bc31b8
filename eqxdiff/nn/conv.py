import abc
import math
from functools import partial
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._dtypes import at_least_float32
from .._types import PRNGKey
from ..sharding import constrain


Padding = tuple[tuple[int, int], tuple[int, int]]


class AbstractConv2d(eqx.Module):
    """A convolution of one channels-last image, whatever it is stored as; see `AbstractLinear`."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        """Convolves `x`; the result has the dtype of `x`."""


class Conv2d(AbstractConv2d):
    """A two-dimensional convolution of one channels-last image; the weight is PyTorch's OIHW.

    On a mesh each device computes with the whole weight, on its part of the image or batch. The
    input decides the precision, as in `Linear`. The layer computes a 1x1 convolution of
    stride 1 as a matrix product, which is faster on every backend.
    """

    weight: Float[Array, "out in kh kw"]
    bias: Float[Array, " out"] | None
    stride: int = eqx.field(static=True, default=1)
    padding: int | Padding = eqx.field(static=True, default=0)

    @classmethod
    def init(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | Padding = 0,
        bias: bool = True,
        key: PRNGKey,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Draws uniformly from `±1/sqrt(in_channels * kernel_size**2)`, as `torch.nn.Conv2d` does.

        `padding` is one number for all four sides, or `((top, bottom), (left, right))`.
        """
        bound = 1 / math.sqrt(in_channels * kernel_size**2)
        weight_key, bias_key = jax.random.split(key)
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        weight = jax.random.uniform(weight_key, shape, dtype, -bound, bound)
        if not bias:
            return cls(weight, None, stride, padding)
        bias_array = jax.random.uniform(bias_key, shape[:1], dtype, -bound, bound)
        return cls(weight, bias_array, stride, padding)

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        # XLA's fast convolution for CPUs wants HWIO. Outside of loops XLA reorders the axes itself,
        # but within `lax.scan` it does not, and OIHW is fifteen times slower.
        weight = self.weight.transpose(2, 3, 1, 0)
        return _apply(x, weight, self.bias, self.stride, self.padding)


class HWIOConv2d(AbstractConv2d):
    """A `Conv2d` whose weight is laid out as the backends compute with it."""

    weight: Float[Array, "kh kw in out"]
    bias: Float[Array, " out"] | None
    stride: int = eqx.field(static=True, default=1)
    padding: int | Padding = eqx.field(static=True, default=0)

    @classmethod
    def of(cls, conv: Conv2d) -> Self:
        """Reorders the axes of a convolution's weight."""
        return cls(conv.weight.transpose(2, 3, 1, 0), conv.bias, conv.stride, conv.padding)

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        return _apply(x, self.weight, self.bias, self.stride, self.padding)


def _apply(
    x: Float[Array, "h w in"],
    weight: Float[Array, "kh kw in out"],
    bias: Float[Array, " out"] | None,
    stride: int,
    padding: int | Padding,
) -> Float[Array, "h2 w2 out"]:
    wide = at_least_float32(x.dtype)
    weight = constrain(weight, None, None, None, None).astype(x.dtype)
    if weight.shape[:2] == (1, 1) and stride == 1 and padding == 0:
        contract = (((2,), (0,)), ((), ()))
        y = jax.lax.dot_general(x, weight[0, 0], contract, preferred_element_type=wide)
    else:
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        convolve = _convolve if x.dtype == wide else _convolve_wide
        y = convolve(x, weight, stride, padding)
    if bias is not None:
        y = y + bias.astype(wide)
    return y.astype(x.dtype)


def _convolve(
    x: Float[Array, "h w in"],
    weight: Float[Array, "kh kw in out"],
    stride: int,
    padding: Padding,
    dtype: DTypeLike | None = None,
) -> Float[Array, "h2 w2 out"]:
    return jax.lax.conv_general_dilated(
        x[None],
        weight,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )[0]


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve_wide(x: Array, weight: Array, stride: int, padding: Padding) -> Array:
    """Convolves a narrow `x` and `weight` with sums in float32, so that the caller rounds once.

    On GPUs the sums are rounded here, because XLA would convert `x` and `weight` to float32 too.
    JAX cannot transpose a convolution whose result has another dtype than its arguments; hence the
    derivative below.
    """
    rounded = lambda x, weight: _convolve(x, weight, stride, padding).astype(jnp.float32)
    exact = lambda x, weight: _convolve(x, weight, stride, padding, jnp.float32)
    return jax.lax.platform_dependent(x, weight, cuda=rounded, rocm=rounded, default=exact)


def _convolve_wide_jvp(stride: int, padding: Padding, primals: Any, tangents: Any) -> Any:
    (x, weight), (dx, dweight) = primals, tangents
    y = _convolve_wide(x, weight, stride, padding)
    is_zero = lambda tangent: isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    parts = [] if is_zero(dx) else [_convolve(dx, weight, stride, padding)]
    parts += [] if is_zero(dweight) else [_convolve(x, dweight, stride, padding)]
    return y, sum((part.astype(y.dtype) for part in parts), jnp.zeros_like(y))


_convolve_wide.defjvp(_convolve_wide_jvp, symbolic_zeros=True)
