"""The FLUX.2 transformer: image and text in two streams, then in one.

Source: https://github.com/black-forest-labs/flux2/blob/main/src/flux2/model.py, with the names of
`Flux2Transformer2DModel` of diffusers. Against FLUX.1, all blocks of a kind share their modulation,
there are no biases, and MLPs are gated.
"""

from typing import NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PyTree

from ..._types import PRNGKey, Scalar
from ...nn import AbstractLinear, Keep, Linear, everything, fold, nothing, rope, stack
from .config import Flux2TransformerConfig
from .layers import (
    Flux2JointAttention,
    Flux2MLP,
    ParallelAttention,
    SharedModulation,
    TimeGuidanceEmbedding,
    modulate_by,
)


class Flux2DoubleBlock(eqx.Module):
    """Image and text as two streams that meet in attention."""

    attn: Flux2JointAttention
    ff: Flux2MLP
    ff_context: Flux2MLP
    eps: float = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: Flux2TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys = jax.random.split(key, 3)
        attn = Flux2JointAttention.init(cfg, key=keys[0], dtype=dtype)
        mlp = lambda key: Flux2MLP.init(cfg, key=key, dtype=dtype)
        return cls(attn, mlp(keys[1]), mlp(keys[2]), cfg.eps)

    def __call__(
        self,
        img: Float[Array, "pixels dim"],
        txt: Float[Array, "tokens dim"],
        img_mod: Float[Array, "6 dim"],
        txt_mod: Float[Array, "6 dim"],
        pe: Float[Array, "tokens+pixels 2 half"],
    ) -> tuple[Float[Array, "pixels dim"], Float[Array, "tokens dim"]]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod

        img_attn, txt_attn = self.attn(
            modulate_by(img, img_shift1, img_scale1, self.eps),
            modulate_by(txt, txt_shift1, txt_scale1, self.eps),
            pe,
        )
        img = img + img_gate1 * img_attn
        img = img + img_gate2 * self.ff(modulate_by(img, img_shift2, img_scale2, self.eps))
        txt = txt + txt_gate1 * txt_attn
        txt = txt + txt_gate2 * self.ff_context(modulate_by(txt, txt_shift2, txt_scale2, self.eps))
        return img, txt


class Flux2SingleBlock(eqx.Module):
    """One stream, attention and MLP side by side."""

    attn: ParallelAttention
    eps: float = eqx.field(static=True)

    @classmethod
    def init(cls, cfg: Flux2TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        return cls(ParallelAttention.init(cfg, key=key, dtype=dtype), cfg.eps)

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        mod: Float[Array, "3 dim"],
        pe: Float[Array, "tokens 2 half"],
    ) -> Float[Array, "tokens dim"]:
        shift, scale, gate = mod
        return x + gate * self.attn(modulate_by(x, shift, scale, self.eps), pe)


class Flux2Outputs(NamedTuple):
    """What `keep` returned for each block's output, stacked along a leading axis."""

    double: PyTree
    """Of each double block; `keep` gets the pair of image `(pixels, dim)` and text."""

    single: PyTree
    """Of each single block; `keep` gets one stream, text before image: `(tokens+pixels, dim)`."""


class Flux2Transformer(eqx.Module):
    """FLUX.2's flow transformer: predicts the velocity of noisy patches, given a prompt."""

    x_embedder: AbstractLinear
    context_embedder: AbstractLinear
    time_guidance_embed: TimeGuidanceEmbedding
    double_stream_modulation_img: SharedModulation
    double_stream_modulation_txt: SharedModulation
    single_stream_modulation: SharedModulation
    transformer_blocks: Flux2DoubleBlock
    single_transformer_blocks: Flux2SingleBlock
    norm_out: SharedModulation
    proj_out: AbstractLinear
    axes_dims_rope: tuple[int, ...] = eqx.field(static=True)
    rope_theta: float = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    remat: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(
        cls, cfg: Flux2TransformerConfig, *, key: PRNGKey, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """Makes a random transformer; the blocks are stacked along a leading axis."""
        keys = jax.random.split(key, 10)
        linear = lambda i, o, key: Linear.init(i, o, bias=False, key=key, dtype=dtype)
        modulation = lambda n, key: SharedModulation.init(cfg.dim, n, key=key, dtype=dtype)
        double = lambda key: Flux2DoubleBlock.init(cfg, key=key, dtype=dtype)
        single = lambda key: Flux2SingleBlock.init(cfg, key=key, dtype=dtype)
        return cls(
            linear(cfg.in_channels, cfg.dim, keys[0]),
            linear(cfg.joint_attention_dim, cfg.dim, keys[1]),
            TimeGuidanceEmbedding.init(cfg, key=keys[2], dtype=dtype),
            modulation(6, keys[3]),
            modulation(6, keys[4]),
            modulation(3, keys[5]),
            stack(double, cfg.num_layers, key=keys[6]),
            stack(single, cfg.num_single_layers, key=keys[7]),
            modulation(2, keys[8]),
            linear(cfg.dim, cfg.in_channels, keys[9]),
            cfg.axes_dims_rope,
            float(cfg.rope_theta),
            cfg.eps,
        )

    def __call__(
        self,
        img: Float[Array, "pixels channels"],
        txt: Float[Array, "tokens text_dim"],
        timestep: Scalar,
        guidance: Scalar | None,
        positions: Float[Array, "tokens+pixels 4"],
    ) -> Float[Array, "pixels channels"]:
        """Predicts the velocity `noise - data` at `img`, in the dtype of `img`.

        **Arguments:**

        - `img`: noisy latent patches, and the patches of reference pictures after them.
        - `txt`: the text encoder's states, in the dtype of `img`.
        - `timestep`: in thousandths: 0 is data and 1000 is noise. At least float32.
        - `guidance`: the embedded guidance scale, where the config has `guidance_embeds`.
        - `positions`: (picture, row, column, place in the text) of each text token and then of each
            patch, for rope.

        **Raises:** `ValueError` where guidance is embedded and `guidance` is `None`.
        """
        return self.capture(img, txt, timestep, guidance, positions, keep=nothing)[0]

    def capture(
        self,
        img: Float[Array, "pixels channels"],
        txt: Float[Array, "tokens text_dim"],
        timestep: Scalar,
        guidance: Scalar | None,
        positions: Float[Array, "tokens+pixels 4"],
        *,
        keep: Keep = everything,
    ) -> tuple[Float[Array, "pixels channels"], Flux2Outputs]:
        """Does what `__call__` does, and also returns `keep(output)` of every block.

        `keep` is that of `nn.fold`: by default the whole output of the block.
        """
        vec = self.time_guidance_embed(timestep, guidance, img.dtype)
        img_mod = self.double_stream_modulation_img(vec)
        txt_mod = self.double_stream_modulation_txt(vec)
        mod = self.single_stream_modulation(vec)
        img, txt = self.x_embedder(img), self.context_embedder(txt)
        pe = rope(positions, self.axes_dims_rope, theta=self.rope_theta)

        double = lambda block, streams: block(*streams, img_mod, txt_mod, pe)
        blocks, remat = self.transformer_blocks, self.remat
        (img, txt), doubles = fold(blocks, (img, txt), double, remat=remat, keep=keep)
        x = jnp.concatenate([txt, img])
        single = lambda block, x: block(x, mod, pe)
        x, singles = fold(self.single_transformer_blocks, x, single, remat=remat, keep=keep)

        scale, shift = self.norm_out(vec)
        velocity = self.proj_out(modulate_by(x[txt.shape[0] :], shift, scale, self.eps))
        return velocity, Flux2Outputs(doubles, singles)
