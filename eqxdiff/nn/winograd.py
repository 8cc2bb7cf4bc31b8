"""A convolution by fewer multiplications, for processors."""

from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._dtypes import at_least_float32
from .conv import AbstractConv2d, Conv2d


STRIP_PIXELS = 1024
STRIP_ROWS = 8
"""An image is computed in strips of about so many pixels, and of no fewer rows than these: the
transformed strip then stays in the cache of a processor's core."""

TILE = 2

# Of a tile d of 4x4 pixels and a kernel g of 3x3, the 2x2 results are A [(G g G') * (B d B')] A'.
B = (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)
G = (1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)
A = (1, 1, 1, 0), (0, 1, -1, -1)


class WinogradConv2d(AbstractConv2d):
    """A 3x3 convolution of stride 1 and padding 1 by Winograd's algorithm F(2x2, 3x3).

    Each 2x2 pixels of the result take 16 multiplications for a channel in place of 36. The layer
    computes in at least float32; its rounding is up to twice that of the sums as they are defined.

    **Fields:**

    - `weights`: the transformed kernels, 16 matrices. They hold 16/9 of the numbers of the kernels.

    Source: https://arxiv.org/abs/1509.09308, section 4.1.
    """

    weights: tuple[Float[Array, "in out"], ...]
    bias: Float[Array, " out"] | None

    @classmethod
    def of(cls, conv: Conv2d) -> Self:
        """Transforms the kernels of a convolution, in at least float32.

        **Raises:** `ValueError` where the convolution has another size, stride or padding.
        """
        if conv.weight.shape[2:] != (3, 3) or conv.stride != 1 or conv.padding != 1:
            raise ValueError("Winograd's algorithm is for 3x3 convolutions of stride 1, padding 1.")
        return cls(_transform(conv.weight), conv.bias)

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h w out"]:
        wide = at_least_float32(x.dtype)
        h, w, _ = x.shape
        strips = -(-h // max(STRIP_ROWS, STRIP_PIXELS // w))
        rows = -(-h // (TILE * strips)) * TILE
        padded = jnp.pad(x.astype(wide), ((1, strips * rows - h + 1), (1, w % TILE + 1), (0, 0)))
        weights = [weight.astype(wide) for weight in self.weights]
        apply = lambda strip: _convolve_strip(strip, weights)
        if strips == 1:
            y = apply(padded)
        else:
            pieces = [padded[i * rows : (i + 1) * rows + 2] for i in range(strips)]
            y = jax.lax.map(apply, jnp.stack(pieces))
            y = y.reshape(strips * rows, *y.shape[2:])
        y = y[:h, :w]
        if self.bias is not None:
            y = y + self.bias.astype(wide)
        return y.astype(x.dtype)


@jax.jit
def _transform(kernels: Float[Array, "out in 3 3"]) -> tuple[Float[Array, "in out"], ...]:
    kernels = kernels.astype(at_least_float32(kernels.dtype))
    rows = _mix(G, [kernels[:, :, i] for i in range(3)])
    return tuple(part.T for row in rows for part in _mix(G, [row[..., i] for i in range(3)]))


def _convolve_strip(
    x: Float[Array, "padded_h padded_w in"], weights: Sequence[Float[Array, "in out"]]
) -> Float[Array, "h w out"]:
    """Convolves a padded strip of even height and width.

    The barriers keep XLA from computing a transform anew for each of its uses.
    """
    h, w = x.shape[0] - 2, x.shape[1] - 2
    rows = _mix(B, [x[i : i + h : TILE] for i in range(4)])
    parts = [part for row in rows for part in _mix(B, [row[:, i : i + w : TILE] for i in range(4)])]
    tiles = jax.lax.optimization_barrier([part.reshape(-1, x.shape[-1]) for part in parts])
    y = [tile @ weight for tile, weight in zip(tiles, weights, strict=True)]
    columns = [_mix(A, y[i::4]) for i in range(4)]
    rows = [_mix(A, [column[i] for column in columns]) for i in range(TILE)]
    pixels = jax.lax.optimization_barrier(rows)
    joined = [jnp.stack([p.reshape(h // 2, w // 2, -1) for p in row], axis=2) for row in pixels]
    return jnp.stack(jax.lax.optimization_barrier(joined), axis=1).reshape(h, w, -1)


def _mix(matrix: Sequence[Sequence[float]], parts: Sequence[Array]) -> list[Array]:
    """Returns for each row of the matrix the sum of the parts, each times its number."""
    mixed = []
    for row in matrix:
        terms = [part if n == 1 else n * part for n, part in zip(row, parts, strict=True) if n]
        mixed.append(sum(terms[1:], start=terms[0]))
    return mixed
