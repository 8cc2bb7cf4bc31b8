"""The text-conditional UNet of Stable Diffusion 1, 2 and XL.

Source: https://arxiv.org/abs/2112.10752 and https://arxiv.org/abs/2307.01952; the names are those
of `UNet2DConditionModel` of diffusers.
"""

from typing import Any, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._types import PRNGKey, Scalar
from ...nn import (
    AbstractConv2d,
    AbstractLinear,
    Conv2d,
    EmbeddingMLP,
    GroupNorm,
    Linear,
    silu,
    sinusoid,
)
from ...sharding import constrain
from .blocks import DownBlock, Keys, MidBlock, SpatialTransformer, UpBlock
from .config import UNetConfig


def embed(cfg: UNetConfig, t: Scalar, dim: int) -> Float[Array, " dim"]:
    """Embeds a number as sines and cosines, by the config's conventions."""
    return sinusoid(t, dim, flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)


class TimeEmbedding(eqx.Module):
    """Embeds the timestep, and in distilled models the guidance scale, in one vector."""

    linear_1: AbstractLinear
    cond_proj: AbstractLinear | None
    linear_2: AbstractLinear

    @classmethod
    def init(cls, cfg: UNetConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys, width, temb = jax.random.split(key, 3), cfg.block_out_channels[0], cfg.temb_channels
        cond_proj = None
        if cfg.time_cond_proj_dim is not None:
            dim = cfg.time_cond_proj_dim
            cond_proj = Linear.init(dim, width, bias=False, key=keys[2], dtype=dtype)
        linear_1 = Linear.init(width, temb, key=keys[0], dtype=dtype)
        return cls(linear_1, cond_proj, Linear.init(temb, temb, key=keys[1], dtype=dtype))

    def __call__(
        self, cfg: UNetConfig, timestep: Scalar, guidance: Scalar | None, dtype: DTypeLike
    ) -> Float[Array, " temb"]:
        """**Raises:** `ValueError` where `guidance` is missing, or given and not embedded."""
        if (guidance is None) != (self.cond_proj is None):
            raise ValueError("A UNet takes `guidance` if and only if it embeds a guidance scale.")
        t = embed(cfg, timestep, cfg.block_out_channels[0]).astype(dtype)
        if guidance is not None and self.cond_proj is not None:
            # As in https://arxiv.org/abs/2310.04378: a scale of 1 is off, and sines come first.
            dim, w = cfg.time_cond_proj_dim or 0, 1000 * (guidance - 1)
            w = sinusoid(w, dim, flip_sin_to_cos=False, freq_shift=1)
            t = t + self.cond_proj(w.astype(dtype))
        return self.linear_2(silu(self.linear_1(t)))


class AddedConditioning(eqx.Module):
    """The conditions that SDXL takes besides the prompt's tokens.

    **Fields:**

    - `text_embeds`: the pooled prompt.
    - `time_ids`: the original size, the crop's offset and the target size, each as height and
        width in pixels (https://arxiv.org/abs/2307.01952, section 2.2).
    """

    text_embeds: Float[Array, " pooled"]
    time_ids: Float[Array, " ids"]


def embed_time(
    cfg: UNetConfig,
    time_embedding: TimeEmbedding,
    add_embedding: EmbeddingMLP | None,
    timestep: Scalar,
    added: AddedConditioning | None,
    guidance: Scalar | None,
    dtype: DTypeLike,
) -> Float[Array, " temb"]:
    """Computes the conditioning vector of a UNet or ControlNet.

    **Raises:** `ValueError` where `added` or `guidance` is given to a model that does not embed it,
    or is missing.
    """
    if (added is None) != (add_embedding is None):
        raise ValueError("A UNet takes `added` if and only if it has an `add_embedding`.")
    temb = time_embedding(cfg, timestep, guidance, dtype)
    if added is not None and add_embedding is not None:
        dim = cfg.addition_time_embed_dim or 0
        ids = jax.vmap(lambda number: embed(cfg, number, dim))(added.time_ids).reshape(-1)
        vector = jnp.concatenate([added.text_embeds.astype(dtype), ids.astype(dtype)])
        temb = temb + add_embedding(vector)
    return temb


def init_added(cfg: UNetConfig, *, key: PRNGKey, dtype: DTypeLike) -> EmbeddingMLP | None:
    """Makes a random embedder of `AddedConditioning`, where the config asks for one."""
    if cfg.addition_embed_type is None:
        return None
    dim = cfg.projection_class_embeddings_input_dim or 0
    return EmbeddingMLP.init(dim, cfg.temb_channels, key=key, dtype=dtype)


def skip_channels(cfg: UNetConfig) -> list[int]:
    """Returns the width of each layer on the way down whose output the way up takes."""
    widths = [cfg.block_out_channels[0]]
    for level, width in enumerate(cfg.block_out_channels):
        layers = cfg.layers_per_block + (level < cfg.levels - 1)  # a downsampler is one more
        widths += [width] * layers
    return widths


class Residuals(eqx.Module):
    """The arrays that a ControlNet adds to a UNet's skips, first to last, and to its middle."""

    down: tuple[Float[Array, "_ _ _"], ...]
    mid: Float[Array, "h w c"]


class PromptKeys(eqx.Module):
    """The keys and values of a prompt in every transformer of a UNet, level by level."""

    down: tuple[tuple[Keys, ...], ...]
    mid: tuple[Keys, ...]
    up: tuple[tuple[Keys, ...], ...]


class LevelOutputs(NamedTuple):
    """What the levels of a UNet put out, before a ControlNet adds to it."""

    down: tuple[Float[Array, "_ _ _"], ...]
    """The output of `conv_in` and of each layer on the way down."""

    mid: Float[Array, "h w c"]
    """The output of the middle level."""

    up: tuple[Float[Array, "_ _ _"], ...]
    """The output of each level on the way up, the coarsest first."""


class UNet(eqx.Module):
    """Predicts the parameterization's target of a noisy latent, given a timestep and a prompt."""

    conv_in: AbstractConv2d
    time_embedding: TimeEmbedding
    add_embedding: EmbeddingMLP | None
    down_blocks: tuple[DownBlock, ...]
    mid_block: MidBlock
    up_blocks: tuple[UpBlock, ...]
    conv_norm_out: GroupNorm
    conv_out: AbstractConv2d
    config: UNetConfig = eqx.field(static=True)
    remat: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(cls, cfg: UNetConfig, *, key: PRNGKey, dtype: DTypeLike = jnp.float32) -> Self:
        """Makes a random UNet; the transformer blocks of a layer are stacked."""
        keys = iter(jax.random.split(key, 2 * cfg.levels + 5))
        width, out, eps = cfg.block_out_channels[0], cfg.out_channels, cfg.norm_eps
        down = lambda level: DownBlock.init(cfg, level, key=next(keys), dtype=dtype)
        skips = skip_channels(cfg)
        take = lambda: [skips.pop() for _ in range(cfg.layers_per_block + 1)]
        up = lambda level: UpBlock.init(cfg, level, take(), key=next(keys), dtype=dtype)
        return cls(
            Conv2d.init(cfg.in_channels, width, 3, padding=1, key=next(keys), dtype=dtype),
            TimeEmbedding.init(cfg, key=next(keys), dtype=dtype),
            init_added(cfg, key=next(keys), dtype=dtype),
            tuple(down(level) for level in range(cfg.levels)),
            MidBlock.init(cfg, key=next(keys), dtype=dtype),
            tuple(up(level) for level in reversed(range(cfg.levels))),
            GroupNorm.init(width, groups=cfg.norm_num_groups, eps=eps, dtype=dtype),
            Conv2d.init(width, out, 3, padding=1, key=next(keys), dtype=dtype),
            cfg,
        )

    def __call__(
        self,
        x: Float[Array, "h w channels"],
        timestep: Scalar,
        context: Float[Array, "tokens context_dim"] | PromptKeys,
        added: AddedConditioning | None = None,
        *,
        guidance: Scalar | None = None,
        residuals: Residuals | None = None,
    ) -> Float[Array, "h w out"]:
        """Predicts at `x`, in the dtype of `x`.

        **Arguments:**

        - `x`: the noisy latent, scaled as the parameterization wants it.
        - `timestep`: in thousandths: 0 is data and 1000 is noise. At least float32.
        - `context`: the prompt's hidden states, in the dtype of `x`, or what `keys` made of them.
        - `added`: for a config with `addition_embed_type`.
        - `guidance`: the guidance scale, for a config with `time_cond_proj_dim`.
        - `residuals`: the sum of the residuals of all ControlNets.

        **Raises:** `ValueError` where `added` or `guidance` is given to a model that does not embed
        it, or is missing.
        """
        more = {"guidance": guidance, "residuals": residuals}
        return self.capture(x, timestep, context, added, **more)[0]

    def capture(
        self,
        x: Float[Array, "h w channels"],
        timestep: Scalar,
        context: Float[Array, "tokens context_dim"] | PromptKeys,
        added: AddedConditioning | None = None,
        *,
        guidance: Scalar | None = None,
        residuals: Residuals | None = None,
    ) -> tuple[Float[Array, "h w out"], LevelOutputs]:
        """Does what `__call__` does, and also returns what the levels put out."""
        embedders = self.time_embedding, self.add_embedding
        temb = embed_time(self.config, *embedders, timestep, added, guidance, x.dtype)
        skips = [self.conv_in(constrain(x, "rows", None, None))]
        down, mid, up = _by_level(context, len(self.down_blocks))
        for block, prompt in zip(self.down_blocks, down, strict=True):
            skips += block(skips[-1], temb, prompt, self.remat)
        x = self.mid_block(skips[-1], temb, mid, self.remat)
        outputs, middle, ups = tuple(skips), x, []
        if residuals is not None:
            skips = [skip + y for skip, y in zip(skips, residuals.down, strict=True)]
            x = x + residuals.mid
        for block, prompt in zip(self.up_blocks, up, strict=True):
            x, skips = block(x, skips, temb, prompt, self.remat)
            ups.append(x)
        x = self.conv_out(silu(self.conv_norm_out(x)))
        return x, LevelOutputs(outputs, middle, tuple(ups))

    def keys(self, context: Float[Array, "tokens context_dim"]) -> PromptKeys:
        """Returns the keys and values of a prompt, which no step changes."""
        of = lambda level: tuple(each.keys(context) for each in level.attentions)
        return PromptKeys(
            tuple(of(level) for level in self.down_blocks),
            of(self.mid_block),
            tuple(of(level) for level in self.up_blocks),
        )

    def without_keys(self) -> "UNet":
        """Returns the UNet for `PromptKeys` alone, without the weights that `keys` uses."""
        is_transformer = lambda node: isinstance(node, SpatialTransformer)
        drop = lambda node: node.without_keys() if is_transformer(node) else node
        return jax.tree.map(drop, self, is_leaf=is_transformer)


def _by_level(context: Array | PromptKeys, levels: int) -> tuple[Any, Any, Any]:
    """Returns the context of each level on the way down, of the middle, and on the way up."""
    if isinstance(context, PromptKeys):
        return context.down, context.mid, context.up
    return (context,) * levels, context, (context,) * levels
