"""ControlNet: a copy of a UNet's way down that reads an image of what to draw where.

Source: https://arxiv.org/abs/2302.05543; the names are those of `ControlNetModel` of diffusers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._config import parse_config
from ..._dtypes import at_least_float32
from ..._types import PRNGKey, Scalar
from ...nn import AbstractConv2d, Conv2d, EmbeddingMLP, silu
from .blocks import DownBlock, MidBlock
from .config import IGNORED, SUPPORTED, UNetConfig
from .network import (
    AddedConditioning,
    Residuals,
    TimeEmbedding,
    embed_time,
    init_added,
    skip_channels,
)


@dataclasses.dataclass(frozen=True)
class ControlNetConfig:
    """The sizes of a ControlNet, named as in its `config.json`.

    **Fields:**

    - `unet`: those of the UNet whose way down it copies, from the same file.
    - `conditioning_embedding_out_channels`: the widths of the convolutions that the image goes
        through. Each but the first halves its size.
    - `controlnet_conditioning_channel_order`: `"rgb"` or `"bgr"`, what the weights expect. Images
        are given as RGB in any case.
    """

    unet: UNetConfig
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"

    def __post_init__(self):
        if self.controlnet_conditioning_channel_order not in ("rgb", "bgr"):
            order = self.controlnet_conditioning_channel_order
            raise ValueError(
                f"controlnet_conditioning_channel_order: {order!r}, not 'rgb' or 'bgr'"
            )
        if not self.conditioning_embedding_out_channels:
            raise ValueError("conditioning_embedding_out_channels: an empty list")

    @property
    def downscale(self) -> int:
        """How many pixels of the image a latent pixel stands for, in each direction."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads a ControlNet's `config.json`. **Raises:** `ConfigError`."""
        name = "controlnet/config.json"
        own = {field.name for field in dataclasses.fields(cls)} - {"unet"}
        shared = {key: value for key, value in fields.items() if key not in own}
        supported = {
            "_class_name": ("ControlNetModel",),
            "global_pool_conditions": (False,),
            **SUPPORTED,
        }
        unet = parse_config(UNetConfig, shared, name=name, supported=supported, ignored=IGNORED)
        given = {key: value for key, value in fields.items() if key in own}
        return parse_config(cls, {"unet": unet, **given}, name=name)


class ConditioningEmbedding(eqx.Module):
    """An image to the size and width of the UNet's first layer."""

    conv_in: AbstractConv2d
    blocks: tuple[AbstractConv2d, ...]
    conv_out: AbstractConv2d

    @classmethod
    def init(cls, cfg: ControlNetConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        widths = cfg.conditioning_embedding_out_channels
        keys = iter(jax.random.split(key, 2 * len(widths)))
        conv = lambda i, o, stride=1: Conv2d.init(
            i, o, 3, stride=stride, padding=1, key=next(keys), dtype=dtype
        )
        blocks = []
        for width, wider in pairwise(widths):
            blocks += [conv(width, width), conv(width, wider, stride=2)]
        conv_in = conv(cfg.conditioning_channels, widths[0])
        return cls(conv_in, tuple(blocks), conv(widths[-1], cfg.unet.block_out_channels[0]))

    def __call__(self, image: Float[Array, "H W channels"]) -> Float[Array, "h w width"]:
        x = silu(self.conv_in(image))
        for conv in self.blocks:
            x = silu(conv(x))
        return self.conv_out(x)


class ControlNet(eqx.Module):
    """A noisy latent, a timestep, a prompt and an image to what a UNet's layers shall add."""

    conv_in: AbstractConv2d
    time_embedding: TimeEmbedding
    add_embedding: EmbeddingMLP | None
    controlnet_cond_embedding: ConditioningEmbedding
    down_blocks: tuple[DownBlock, ...]
    mid_block: MidBlock
    controlnet_down_blocks: tuple[AbstractConv2d, ...]
    controlnet_mid_block: AbstractConv2d
    config: ControlNetConfig = eqx.field(static=True)
    remat: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(cls, cfg: ControlNetConfig, *, key: PRNGKey, dtype: DTypeLike = jnp.float32) -> Self:
        """A random ControlNet that, its last convolutions being zero, changes nothing yet."""
        unet = cfg.unet
        keys = iter(jax.random.split(key, unet.levels + 5))
        width = unet.block_out_channels[0]
        down = lambda level: DownBlock.init(unet, level, key=next(keys), dtype=dtype)
        zero = lambda width: Conv2d(jnp.zeros((width, width, 1, 1), dtype), jnp.zeros(width, dtype))
        return cls(
            Conv2d.init(unet.in_channels, width, 3, padding=1, key=next(keys), dtype=dtype),
            TimeEmbedding.init(unet, key=next(keys), dtype=dtype),
            init_added(unet, key=next(keys), dtype=dtype),
            ConditioningEmbedding.init(cfg, key=next(keys), dtype=dtype),
            tuple(down(level) for level in range(unet.levels)),
            MidBlock.init(unet, key=next(keys), dtype=dtype),
            tuple(zero(width) for width in skip_channels(unet)),
            zero(unet.block_out_channels[-1]),
            cfg,
        )

    def __call__(
        self,
        x: Float[Array, "h w channels"],
        timestep: Scalar,
        context: Float[Array, "tokens context_dim"],
        image: Float[Array, "H W colours"],
        added: AddedConditioning | None = None,
        *,
        scale: Scalar,
        guess: bool = False,
    ) -> Residuals:
        """What to add to the UNet's layers, in the dtype of `x`.

        **Arguments:**

        - `x`, `timestep`, `context`, `added`: as the UNet takes them.
        - `image`: RGB from 0 to 1, `config.downscale` times the height and width of `x`, in the
            dtype of `x`.
        - `scale`: what all is multiplied by; 0 is off.
        - `guess`: weaken the layers of high resolution down to a tenth, so that the image alone
            can guide where there is no prompt.

        **Raises:** `ValueError` where the image has another size, or `added` is given to a model
        without it or missing in one with it.
        """
        cfg = self.config
        size = cfg.downscale * x.shape[0], cfg.downscale * x.shape[1]
        if image.shape[:2] != size:
            given, wanted = (f"{w}x{h}" for h, w in (image.shape[:2], size))
            raise ValueError(f"A control image is {given} where {wanted} is wanted.")
        if cfg.controlnet_conditioning_channel_order == "bgr":
            image = image[:, :, ::-1]
        embedders = self.time_embedding, self.add_embedding
        temb = embed_time(cfg.unet, *embedders, timestep, added, None, x.dtype)
        skips = [self.conv_in(x) + self.controlnet_cond_embedding(image)]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, context, self.remat)
        middle = self.mid_block(skips[-1], temb, context, self.remat)

        down = [conv(y) for conv, y in zip(self.controlnet_down_blocks, skips, strict=True)]
        outputs = [*down, self.controlnet_mid_block(middle)]
        scales = jnp.broadcast_to(scale.astype(at_least_float32(scale.dtype)), len(outputs))
        if guess:
            scales = scales * jnp.logspace(-1, 0, len(outputs), dtype=scales.dtype)
        wide = at_least_float32(x.dtype)
        outputs = [
            (y.astype(wide) * s.astype(wide)).astype(x.dtype)
            for y, s in zip(outputs, scales, strict=True)
        ]
        return Residuals(tuple(outputs[:-1]), outputs[-1])


def sum_residuals(residuals: Sequence[Residuals]) -> Residuals:
    """What several ControlNets, at least one, add together."""
    first, *rest = residuals
    for other in rest:
        first = jax.tree.map(jnp.add, first, other)
    return first
