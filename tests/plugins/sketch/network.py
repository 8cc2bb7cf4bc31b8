"""The three networks. Fields are called as in the published files; tables list the exceptions."""

from collections.abc import Sequence
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from eqxdiff.kernels import attention
from eqxdiff.nn import (
    MLP,
    AbstractConv2d,
    AbstractLinear,
    Conv2d,
    Embedding,
    EmbeddingMLP,
    LayerNorm,
    Linear,
    apply_rope,
    fold,
    gelu_tanh,
    rope,
    sinusoid,
    stack,
)

from .config import PainterConfig, PressConfig, ScribeConfig


EPS = 1e-6
SINUSOID_DIM = 64
THETA = 100.0

Tokens = Float[Array, "tokens dim"]


class Block(eqx.Module):
    """Attention to the tokens that the mask shows, then an MLP, each after a norm."""

    norm_1: LayerNorm
    to_q: AbstractLinear
    to_k: AbstractLinear
    to_v: AbstractLinear
    to_out: AbstractLinear
    norm_2: LayerNorm
    mlp: MLP
    heads: int = eqx.field(static=True)

    @classmethod
    def init(cls, dim: int, heads: int, *, key: PRNGKeyArray, dtype: DTypeLike) -> Self:
        *keys, last = jax.random.split(key, 5)
        norm = lambda: LayerNorm.init(dim, eps=EPS, dtype=dtype)
        q, k, v, out = (Linear.init(dim, dim, key=key, dtype=dtype) for key in keys)
        mlp = MLP.init(dim, 4 * dim, activation=gelu_tanh, key=last, dtype=dtype)
        return cls(norm(), q, k, v, out, norm(), mlp, heads)

    def __call__(
        self, x: Tokens, pe: Float[Array, "tokens 2 half"], mask: Bool[Array, " tokens"]
    ) -> Tokens:
        y = self.norm_1(x)
        q, k, v = (f(y).reshape(len(y), self.heads, -1) for f in (self.to_q, self.to_k, self.to_v))
        y = attention(apply_rope(q, pe), apply_rope(k, pe), v, mask=mask[None, None])
        x = x + self.to_out(y.reshape(x.shape))
        return x + self.mlp(self.norm_2(x))


def blocks_of(cfg: ScribeConfig | PainterConfig, *, key: PRNGKeyArray, dtype: DTypeLike) -> Block:
    """Makes the blocks of a network, stacked along a leading axis."""
    init = lambda key: Block.init(cfg.dim, cfg.heads, key=key, dtype=dtype)
    return stack(init, cfg.layers, key=key)


def run(
    blocks: Block, x: Tokens, places: Float[Array, "tokens axes"], mask: Bool[Array, " tokens"]
) -> Tokens:
    """Applies the blocks one after the other to tokens at these places."""
    axes = places.shape[1]
    dims: Sequence[int] = (x.shape[1] // blocks.heads // axes,) * axes
    pe = rope(places, dims, theta=THETA)
    return fold(blocks, x, lambda block, x: block(x, pe, mask))[0]


class Scribe(eqx.Module):
    """The text encoder."""

    letters: Embedding
    blocks: Block
    norm: LayerNorm

    @classmethod
    def init(cls, cfg: ScribeConfig, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Self:
        keys = jax.random.split(key)
        return cls(
            Embedding.init(cfg.vocab_size, cfg.dim, key=keys[0], dtype=dtype),
            blocks_of(cfg, key=keys[1], dtype=dtype),
            LayerNorm.init(cfg.dim, eps=EPS, dtype=dtype),
        )

    def __call__(
        self, ids: Int[Array, " tokens"], mask: Bool[Array, " tokens"], *, dtype: DTypeLike
    ) -> Tokens:
        """Encodes the tokens that `mask` shows; the states of the others mean nothing."""
        places = jnp.arange(len(ids), dtype=jnp.float32)[:, None]
        return self.norm(run(self.blocks, self.letters(ids).astype(dtype), places, mask))


class Painter(eqx.Module):
    """The denoiser: text and latent pixels in one sequence."""

    image_in: AbstractLinear
    text_in: AbstractLinear
    time_embedder: EmbeddingMLP
    boldness_embedder: EmbeddingMLP
    blocks: Block
    norm: LayerNorm
    image_out: AbstractLinear

    @classmethod
    def init(cls, cfg: PainterConfig, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Self:
        keys = jax.random.split(key, 6)
        embedder = lambda key: EmbeddingMLP.init(SINUSOID_DIM, cfg.dim, key=key, dtype=dtype)
        return cls(
            Linear.init(cfg.channels, cfg.dim, key=keys[0], dtype=dtype),
            Linear.init(cfg.text_dim, cfg.dim, key=keys[1], dtype=dtype),
            embedder(keys[2]),
            embedder(keys[3]),
            blocks_of(cfg, key=keys[4], dtype=dtype),
            LayerNorm.init(cfg.dim, eps=EPS, dtype=dtype),
            Linear.init(cfg.dim, cfg.channels, key=keys[5], dtype=dtype),
        )

    def __call__(
        self,
        x: Float[Array, "h w channels"],
        timestep: Float[Array, ""],
        boldness: Float[Array, ""],
        text: Float[Array, "words text_dim"],
        mask: Bool[Array, " words"],
    ) -> Float[Array, "h w channels"]:
        """Predicts the velocity `noise - data`, in the dtype of `x`.

        **Arguments:**

        - `timestep`: in thousandths: 0 is data and 1000 is noise.
        - `text`, `mask`: the states of the prompt's tokens, and which of them are not padding.
        """
        h, w, _ = x.shape
        embed = lambda t: sinusoid(t, SINUSOID_DIM, flip_sin_to_cos=True, freq_shift=0)
        vec = self.time_embedder(embed(timestep).astype(x.dtype))
        vec = vec + self.boldness_embedder(embed(1000 * boldness).astype(x.dtype))
        img = self.image_in(x.reshape(h * w, -1)) + vec
        tokens = jnp.concatenate([self.text_in(text), img])
        mask = jnp.concatenate([mask, jnp.ones(h * w, bool)])
        rows, columns = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij")
        pixels = jnp.stack([rows, columns], axis=-1).reshape(h * w, 2)
        places = jnp.concatenate([jnp.zeros((len(text), 2), pixels.dtype), pixels])
        tokens = run(self.blocks, tokens, places.astype(jnp.float32), mask)
        return self.image_out(self.norm(tokens[len(text) :])).reshape(x.shape)


class Press(eqx.Module):
    """The autoencoder, which draws no noise: a latent pixel stands for a square of pixels."""

    press_in: AbstractConv2d
    press_out: AbstractConv2d
    patch: int = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: PressConfig, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Self:
        keys, p = jax.random.split(key), cfg.patch
        return cls(
            Conv2d.init(3, cfg.channels, p, stride=p, key=keys[0], dtype=dtype),
            Conv2d.init(cfg.channels, 3 * p * p, 3, padding=1, key=keys[1], dtype=dtype),
            p,
        )

    def encode(self, image: Float[Array, "H W 3"]) -> Float[Array, "h w channels"]:
        return self.press_in(image)

    def decode(self, latent: Float[Array, "h w channels"]) -> Float[Array, "H W 3"]:
        h, w, _ = latent.shape
        squares = self.press_out(latent).reshape(h, w, self.patch, self.patch, 3)
        return squares.transpose(0, 2, 1, 3, 4).reshape(h * self.patch, w * self.patch, 3)
