import math
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._dtypes import at_least_float32
from .._types import PRNGKey


class Conv2d(eqx.Module):
    """A two-dimensional convolution of one channels-last image; the weight is PyTorch's OIHW.

    Precision follows the input, as in `Linear`. A 1x1 convolution of stride 1 is computed as a
    matrix product, which is faster on every backend.
    """

    weight: Float[Array, "out in kh kw"]
    bias: Float[Array, " out"] | None
    stride: int = eqx.field(static=True, default=1)
    padding: int | tuple[tuple[int, int], tuple[int, int]] = eqx.field(static=True, default=0)

    @classmethod
    def init(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
        bias: bool = True,
        key: PRNGKey,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Uniform in `±1/sqrt(in_channels * kernel_size**2)`, as `torch.nn.Conv2d`.

        `padding` is symmetric when an integer, else `((top, bottom), (left, right))`.
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
        wide = at_least_float32(x.dtype)
        weight = self.weight.astype(x.dtype)
        if weight.shape[2:] == (1, 1) and self.stride == 1 and self.padding == 0:
            contract = (((2,), (1,)), ((), ()))
            y = jax.lax.dot_general(x, weight[:, :, 0, 0], contract, preferred_element_type=wide)
        else:
            padding = self.padding
            if isinstance(padding, int):
                padding = ((padding, padding), (padding, padding))
            y = jax.lax.conv_general_dilated(
                x[None],
                weight,
                window_strides=(self.stride, self.stride),
                padding=padding,
                dimension_numbers=("NHWC", "OIHW", "NHWC"),
            )[0].astype(wide)
        if self.bias is not None:
            y = y + self.bias.astype(wide)
        return y.astype(x.dtype)
