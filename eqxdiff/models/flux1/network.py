"""The FLUX.1 transformer: image and text in two streams, then in one.

Source: https://github.com/black-forest-labs/flux/blob/802fb47/src/flux/model.py, with the names of
`FluxTransformer2DModel` of diffusers.
"""

from typing import NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PyTree

from ..._types import PRNGKey, Scalar
from ...nn import (
    MLP,
    AbstractLinear,
    Keep,
    Linear,
    each,
    everything,
    fold,
    gelu_tanh,
    nothing,
    rope,
    settle,
    side_by_side,
    stack,
)
from ...sharding import constrain, join_streams, split_streams
from .config import TransformerConfig
from .layers import (
    AbstractModulation,
    Given,
    JointAttention,
    Modulation,
    SelfAttention,
    TimeTextEmbedding,
    modulate,
    modulate_ahead,
)


THETA = 10000.0
MLP_RATIO = 4


class DoubleBlock(eqx.Module):
    """Image and text as two streams that meet in attention."""

    norm1: AbstractModulation
    norm1_context: AbstractModulation
    attn: JointAttention
    ff: MLP
    ff_context: MLP

    @classmethod
    def init(cls, cfg: TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys = jax.random.split(key, 5)
        norm = lambda key: Modulation.init(cfg.dim, 6, key=key, dtype=dtype)
        attn = JointAttention.init(cfg, key=keys[2], dtype=dtype)
        hidden = MLP_RATIO * cfg.dim
        mlp = lambda key: MLP.init(cfg.dim, hidden, activation=gelu_tanh, key=key, dtype=dtype)
        return cls(norm(keys[0]), norm(keys[1]), attn, mlp(keys[3]), mlp(keys[4]))

    def __call__(
        self,
        img: Float[Array, "pixels dim"],
        txt: Float[Array, "tokens dim"],
        vec: Float[Array, " dim"] | None,
        pe: Float[Array, "tokens+pixels 2 half"],
    ) -> tuple[Float[Array, "pixels dim"], Float[Array, "tokens dim"]]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.norm1(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.norm1_context(
            vec
        )

        img_attn, txt_attn = self.attn(
            modulate(img, img_shift1, img_scale1), modulate(txt, txt_shift1, txt_scale1), pe
        )
        img = img + img_gate1 * img_attn
        img = img + img_gate2 * self.ff(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * txt_attn
        txt = txt + txt_gate2 * self.ff_context(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleBlock(eqx.Module):
    """One stream, attention and MLP side by side (https://arxiv.org/abs/2302.05442)."""

    norm: AbstractModulation
    attn: SelfAttention
    proj_mlp: AbstractLinear
    proj_out: AbstractLinear

    @classmethod
    def init(cls, cfg: TransformerConfig, *, key: PRNGKey, dtype: DTypeLike) -> Self:
        keys = jax.random.split(key, 4)
        hidden = MLP_RATIO * cfg.dim
        return cls(
            Modulation.init(cfg.dim, 3, key=keys[0], dtype=dtype),
            SelfAttention.init(cfg, key=keys[1], dtype=dtype),
            Linear.init(cfg.dim, hidden, key=keys[2], dtype=dtype),
            Linear.init(cfg.dim + hidden, cfg.dim, key=keys[3], dtype=dtype),
        )

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        vec: Float[Array, " dim"] | None,
        pe: Float[Array, "tokens 2 half"],
    ) -> Float[Array, "tokens dim"]:
        shift, scale, gate = self.norm(vec)
        y = modulate(x, shift, scale)
        hidden = settle(gelu_tanh(self.proj_mlp(y)))
        y = side_by_side(self.proj_out, self.attn(y, pe), hidden)
        return x + gate * y


class Modulations(eqx.Module):
    """The shifts, scales and gates of all blocks, at one noise level or, stacked, at several."""

    img: Float[Array, "*rows doubles 6 dim"]
    txt: Float[Array, "*rows doubles 6 dim"]
    single: Float[Array, "*rows singles 3 dim"]
    out: Float[Array, "*rows 2 dim"]


class BlockOutputs(NamedTuple):
    """What `keep` returned for each block's output, stacked along a leading axis."""

    double: PyTree
    """Of each double block; `keep` gets the pair of image `(pixels, dim)` and text."""

    single: PyTree
    """Of each single block; `keep` gets one stream, text before image: `(tokens+pixels, dim)`."""


class Transformer(eqx.Module):
    """FLUX.1's flow transformer: predicts the velocity of noisy patches, given a prompt."""

    x_embedder: AbstractLinear
    context_embedder: AbstractLinear
    time_text_embed: TimeTextEmbedding
    transformer_blocks: DoubleBlock
    single_transformer_blocks: SingleBlock
    norm_out: AbstractModulation
    proj_out: AbstractLinear
    axes_dims_rope: tuple[int, ...] = eqx.field(static=True)
    remat: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(cls, cfg: TransformerConfig, *, key: PRNGKey, dtype: DTypeLike = jnp.float32) -> Self:
        """Makes a random transformer; the blocks are stacked along a leading axis."""
        keys = jax.random.split(key, 7)
        double = lambda key: DoubleBlock.init(cfg, key=key, dtype=dtype)
        single = lambda key: SingleBlock.init(cfg, key=key, dtype=dtype)
        return cls(
            Linear.init(cfg.in_channels, cfg.dim, key=keys[0], dtype=dtype),
            Linear.init(cfg.joint_attention_dim, cfg.dim, key=keys[1], dtype=dtype),
            TimeTextEmbedding.init(cfg, key=keys[2], dtype=dtype),
            stack(double, cfg.num_layers, key=keys[3]),
            stack(single, cfg.num_single_layers, key=keys[4]),
            Modulation.init(cfg.dim, 2, key=keys[5], dtype=dtype),
            Linear.init(cfg.dim, cfg.in_channels, key=keys[6], dtype=dtype),
            cfg.axes_dims_rope,
        )

    def __call__(
        self,
        img: Float[Array, "pixels channels"],
        txt: Float[Array, "tokens text_dim"],
        pooled: Float[Array, " pooled_dim"],
        timestep: Scalar,
        guidance: Scalar | None,
        positions: Float[Array, "tokens+pixels 3"],
    ) -> Float[Array, "pixels channels"]:
        """Predicts the velocity `noise - data` at `img`, in the dtype of `img`.

        **Arguments:**

        - `img`: noisy latent patches.
        - `txt`, `pooled`: T5's last hidden states and CLIP's pooled state, in the dtype of `img`.
        - `timestep`: in thousandths: 0 is data and 1000 is noise. At least float32.
        - `guidance`: the embedded guidance scale, where the config has `guidance_embeds`.
        - `positions`: (0, row, column) of each text token and then of each patch, for rope.

        **Raises:** `ValueError` where guidance is embedded and `guidance` is `None`.
        """
        inputs = img, txt, pooled, timestep, guidance, positions
        return self.capture(*inputs, keep=nothing)[0]

    def capture(
        self,
        img: Float[Array, "pixels channels"],
        txt: Float[Array, "tokens text_dim"],
        pooled: Float[Array, " pooled_dim"],
        timestep: Scalar,
        guidance: Scalar | None,
        positions: Float[Array, "tokens+pixels 3"],
        *,
        keep: Keep = everything,
    ) -> tuple[Float[Array, "pixels channels"], BlockOutputs]:
        """Does what `__call__` does, and also returns `keep(output)` of every block.

        `keep` is that of `nn.fold`: by default the whole output of the block.
        """
        vec = self.time_text_embed(timestep, guidance, pooled)
        return self.flow(img, self.context_embedder(txt), vec, self.rope(positions), keep=keep)

    def flow(
        self,
        img: Float[Array, "pixels channels"],
        txt: Float[Array, "tokens dim"],
        vec: Float[Array, " dim"] | None,
        pe: Float[Array, "tokens+pixels 2 half"],
        *,
        keep: Keep = nothing,
    ) -> tuple[Float[Array, "pixels channels"], BlockOutputs]:
        """Does what `capture` does after embedding the text, the time and the positions.

        `vec` may be `None` in a transformer that is `modulated`.
        """
        tokens, remat = txt.shape[0], self.remat
        spread = lambda x: constrain(x, "tokens", None)
        img, txt = spread(self.x_embedder(img)), spread(txt)
        pe = join_streams(pe[:tokens], pe[tokens:])

        double = lambda block, streams: tuple(map(spread, block(*streams, vec, pe)))
        blocks = modulate_ahead(self.transformer_blocks, ("norm1", "norm1_context"), vec)
        (img, txt), doubles = fold(blocks, (img, txt), double, remat=remat, keep=keep)
        x = join_streams(txt, img)
        single = lambda block, x: spread(block(x, vec, pe))
        blocks = modulate_ahead(self.single_transformer_blocks, ("norm",), vec)
        in_order = lambda x: keep(jnp.concatenate(split_streams(x, tokens)))
        x, singles = fold(blocks, x, single, remat=remat, keep=in_order)

        scale, shift = self.norm_out(vec)
        velocity = self.proj_out(modulate(split_streams(x, tokens)[1], shift, scale))
        return velocity, BlockOutputs(doubles, singles)

    def rope(self, positions: Float[Array, "tokens 3"]) -> Float[Array, "tokens 2 half"]:
        """Returns the cosines and sines of positions."""
        return rope(positions, self.axes_dims_rope, theta=THETA)

    def modulations(self, vecs: Float[Array, "rows dim"]) -> Modulations:
        """Computes the modulations of all blocks for several conditioning vectors."""
        double, single = self.transformer_blocks, self.single_transformer_blocks
        rows = lambda norm: jax.vmap(norm)(vecs)
        layers = lambda norm: jnp.moveaxis(each(norm, rows), 1, 0)
        img, txt = layers(double.norm1), layers(double.norm1_context)
        return Modulations(img, txt, layers(single.norm), rows(self.norm_out))

    def modulated(self, by: Modulations | None) -> "Transformer":
        """Returns the transformer for `flow` without `vec`: with given modulations for its own.

        `None` leaves them out, and all that only they and the text are computed with.
        """
        values = () if by is None else (by.img, by.txt, by.single, by.out)
        given = map(Given, values) if values else (None,) * 4
        return eqx.tree_at(_replaced, self, (*given, None, None), is_leaf=lambda x: x is None)


def _replaced(model: Transformer) -> tuple[PyTree, ...]:
    """Returns what `modulated` replaces, and then what it leaves out."""
    double, single = model.transformer_blocks, model.single_transformer_blocks
    modulations = double.norm1, double.norm1_context, single.norm, model.norm_out
    return *modulations, model.context_embedder, model.time_text_embed
