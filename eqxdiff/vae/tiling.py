"""Encoding and decoding of large images, the levels of high resolution piece by piece.

A tile alone would be normalised by its own statistics, which shifts colours and contrast from tile
to tile. Here all tiles share the statistics of the whole: passes over the tiles measure them, each
with the statistics of the pass before, and a last pass computes the result. The coarsest level,
with the attention, is computed for the whole image at once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from .._dtypes import at_least_float32
from ..nn import GroupNorm, ResnetBlock2D, silu
from .autoencoder import AutoencoderKL, Posterior
from .blocks import DecoderLevel, EncoderLevel


def decode_tiled(
    vae: AutoencoderKL,
    latent: Float[Array, "h w latent"],
    *,
    tile: int = 64,
    overlap: int = 16,
    passes: int = 2,
) -> Float[Array, "H W channels"]:
    """`vae.decode` with all but the coarsest level computed in overlapping tiles.

    Memory is that of a tile, of the coarsest level and of the image; time grows with the overlap
    and is about `passes + 1` times that of `decode`. The result is not exact, for two reasons that
    both fade with their argument: a statistic that a late norm has is measured while earlier ones
    are not settled yet (`passes`), and pixels near the edge of a tile miss their neighbours
    (`overlap`). A latent of no more than one tile is decoded as by `decode`.

    **Arguments:**

    - `tile`: the side of a tile, in latent pixels.
    - `overlap`: how much neighbouring tiles have in common, in latent pixels.
    - `passes`: how many times the statistics are measured.

    **Raises:** `ValueError` where `overlap` is not between 0 and `tile`, or `passes` is below 1.
    """
    size = latent.shape[0], latent.shape[1]
    first, *rest = vae.decoder.up_blocks
    layers = (*_layers(rest), vae.decoder.conv_norm_out, vae.decoder.conv_out)
    x = first(vae.decoder.start(vae.to_decoder(latent)))
    return _run_tiled(layers, x, size, tile, overlap, passes)


def encode_tiled(
    vae: AutoencoderKL,
    image: Float[Array, "H W channels"],
    *,
    tile: int = 64,
    overlap: int = 16,
    passes: int = 2,
) -> Posterior:
    """`vae.encode` with all but the coarsest level computed in overlapping tiles.

    Memory, error and arguments are as in `decode_tiled`; `tile` and `overlap` are in latent pixels.

    **Raises:** `ValueError` as `decode_tiled`, or where a side of the image is not a multiple of
    `vae.downscale`.
    """
    *rest, last = vae.encoder.down_blocks
    layers = (vae.encoder.conv_in, *_layers(rest))
    x = _run_tiled(layers, image, vae.latent_size(image), tile, overlap, passes)
    return vae.from_encoder(vae.encoder.finish(last(x)))


def _layers(blocks: Sequence[EncoderLevel | DecoderLevel]) -> tuple[Callable[[Array], Array], ...]:
    return tuple(layer for block in blocks for layer in block.layers)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Tiles of one shape that cover an area evenly; all in latent pixels."""

    size: tuple[int, int]
    shape: tuple[int, int]
    starts: tuple[np.ndarray, np.ndarray]
    overlap: int

    @classmethod
    def make(cls, size: tuple[int, int], tile: int, overlap: int) -> Self:
        shape = min(tile, size[0]), min(tile, size[1])
        starts = []
        for side, cut in zip(size, shape, strict=True):
            count = 1 - (cut - side) // (tile - overlap)
            starts.append(np.round(np.linspace(0, side - cut, count)).astype(np.int32))
        return cls(size, shape, (starts[0], starts[1]), overlap)

    @property
    def tiles(self) -> Int[Array, "tiles 2"]:
        """The index of each tile, row and column."""
        count = len(self.starts[0]), len(self.starts[1])
        return jnp.asarray(np.indices(count, np.int32).reshape(2, -1).T)

    def corner(self, tile: Int[Array, "2"], unit: int) -> tuple[Array, Array, int]:
        """Where a tile starts in an image that has `unit` pixels to a latent pixel."""
        row, column = (jnp.asarray(s)[i] for s, i in zip(self.starts, tile, strict=True))
        return unit * row, unit * column, 0

    def share(self, tile: Int[Array, "2"], unit: int, dtype: DTypeLike) -> Float[Array, "h w"]:
        """Returns how much each pixel of a tile counts; the shares of all tiles add up to one.

        A tile fades out linearly towards its neighbours. The outer quarter of the overlap counts
        for nothing, because the padding of the convolutions shows there.
        """
        sides = []
        for side, cut, starts in zip(self.size, self.shape, self.starts, strict=True):
            position = np.arange(unit * side) + 0.5
            after = position - unit * starts[:, None]
            before = unit * cut - after
            after[0], before[-1] = np.inf, np.inf  # the image's own border
            inside = np.minimum(after, before) / (unit * self.overlap)
            weights = np.clip(2 * inside - 0.5, 0, 1)
            weights[0, unit * cut :], weights[-1, : unit * (side - cut)] = 0, 0
            weights /= weights.sum(axis=0)
            cuts = [w[unit * s :][: unit * cut] for w, s in zip(weights, starts, strict=True)]
            sides.append(jnp.asarray(np.stack(cuts), dtype))
        rows, columns = (weights[i] for weights, i in zip(sides, tile, strict=True))
        return rows[:, None] * columns


class _Moments(eqx.Module):
    """Mean and variance of each group of channels over a mass of pixels."""

    mass: Float[Array, ""]
    mean: Float[Array, " groups"]
    variance: Float[Array, " groups"]

    @classmethod
    def empty(cls, groups: int, dtype: DTypeLike) -> Self:
        return cls(jnp.zeros((), dtype), jnp.zeros(groups, dtype), jnp.zeros(groups, dtype))

    @classmethod
    def measure(cls, x: Float[Array, "h w c"], share: Float[Array, "h w"], groups: int) -> Self:
        mass = jnp.sum(share)
        weight = share[:, :, None] / mass
        x = x.astype(weight.dtype).reshape(*x.shape[:2], groups, -1)
        mean = jnp.sum(weight * jnp.mean(x, axis=3), axis=(0, 1))
        square = jnp.mean(jnp.square(x - mean[:, None]), axis=3)
        return cls(mass, mean, jnp.sum(weight * square, axis=(0, 1)))

    def merge(self, other: Self) -> "_Moments":
        mass = self.mass + other.mass
        a, b = self.mass / mass, other.mass / mass
        mean = a * self.mean + b * other.mean
        between = a * b * jnp.square(self.mean - other.mean)
        return _Moments(mass, mean, a * self.variance + b * other.variance + between)


def _run(
    layers: Sequence[Callable[[Array], Array]],
    x: Float[Array, "h w in"],
    normalize: Callable[[GroupNorm, Array], Array],
) -> Float[Array, "h2 w2 out"]:
    """The layers one after another; a group norm, by `normalize`, and a SiLU count as a layer."""
    for layer in layers:
        if isinstance(layer, GroupNorm):
            x = silu(normalize(layer, x))
        elif isinstance(layer, ResnetBlock2D):
            y = layer.conv1(silu(normalize(layer.norm1, x)))
            y = layer.conv2(silu(normalize(layer.norm2, y)))
            x = y + (x if layer.conv_shortcut is None else layer.conv_shortcut(x))
        else:
            x = layer(x)
    return x


def _run_tiled(
    layers: Sequence[Callable[[Array], Array]],
    x: Float[Array, "h w in"],
    size: tuple[int, int],
    tile: int,
    overlap: int,
    passes: int,
) -> Float[Array, "h2 w2 out"]:
    """The layers on an `x` of `size` latent pixels, tile by tile."""
    if not 0 < overlap < tile:
        raise ValueError(f"An overlap of {overlap} is not between 0 and the tile's size, {tile}.")
    if passes < 1:
        raise ValueError(f"{passes} passes cannot measure the statistics; give at least 1.")
    if max(size) <= tile:
        return _run(layers, x, lambda norm, x: norm(x))
    grid, wide, unit = (
        _Grid.make(size, tile, overlap),
        at_least_float32(x.dtype),
        x.shape[0] // size[0],
    )

    def run_tile(tile: Array, known: list[_Moments]):
        """The output of a tile, and its own statistics at each norm; where those of the whole are
        not known yet, its own serve."""
        shape = unit * grid.shape[0], unit * grid.shape[1], x.shape[2]
        part = lax.dynamic_slice(x, grid.corner(tile, unit), shape)
        own = []

        def normalize(norm, y):
            share = grid.share(tile, y.shape[0] // grid.shape[0], wide)
            own.append(_Moments.measure(y, share, norm.groups))
            whole = known[len(own) - 1]
            use = lambda whole_, own_: jnp.where(whole.mass > 0, whole_, own_)
            used = jax.tree.map(use, whole, own[-1])
            return norm.normalize(y, used.mean, used.variance)

        return _run(layers, part, normalize), own

    def measure(known, _):
        def add(total, tile):
            own = run_tile(tile, known)[1]
            return [a.merge(b) for a, b in zip(total, own, strict=True)], None

        return lax.scan(jax.checkpoint(add), empty, grid.tiles)[0], None

    def add(total, tile):
        part = run_tile(tile, known)[0].astype(wide)
        unit = part.shape[0] // grid.shape[0]
        corner = grid.corner(tile, unit)
        part = part * grid.share(tile, unit, wide)[:, :, None]
        part = part + lax.dynamic_slice(total, corner, part.shape)
        return lax.dynamic_update_slice(total, part, corner), None

    empty = [_Moments.empty(groups, wide) for groups in _groups(layers)]
    known = lax.scan(measure, empty, length=passes)[0]
    one = jax.eval_shape(lambda tile: run_tile(tile, empty)[0], grid.tiles[0])
    scale = one.shape[0] // grid.shape[0]
    total = jnp.zeros((scale * size[0], scale * size[1], one.shape[2]), wide)
    return lax.scan(jax.checkpoint(add), total, grid.tiles)[0].astype(x.dtype)


def _groups(layers: Sequence[Callable[[Array], Array]]) -> list[int]:
    groups = []
    for layer in layers:
        if isinstance(layer, GroupNorm):
            groups.append(layer.groups)
        elif isinstance(layer, ResnetBlock2D):
            groups += [layer.norm1.groups, layer.norm2.groups]
    return groups
