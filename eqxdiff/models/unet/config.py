import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ..._config import parse_config


CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Fields that have one meaning here."""

IGNORED = ("addition_embed_type_num_heads", "dropout", "sample_size", "upcast_attention")
"""Fields that change nothing here: among them whether attention scores are in float32, which they
always are."""


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The sizes of a text-conditional UNet, named as in `unet/config.json`.

    `attention_head_dim` is the number of heads: the published files have always called it so. A
    value that the files give once for all levels may be one number here too. The defaults are
    those of the fields that older files leave out.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (CROSS, CROSS, CROSS, PLAIN)
    in_channels: int = 4
    out_channels: int = 4
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "attention_head_dim", "transformer_layers_per_block"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name}: {value} is not one for each of {levels} levels")
        if levels == 0 or self.layers_per_block < 1:
            raise ValueError("block_out_channels or layers_per_block: nothing to compute")
        if unknown := set(self.down_block_types) - {CROSS, PLAIN}:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"down_block_types: {names} is not supported, only {CROSS} or {PLAIN}")
        for level, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {channels} channels cannot be split into "
                    f"norm_num_groups: {self.norm_num_groups} groups"
                )
            if channels % self.heads(level):
                raise ValueError(
                    f"attention_head_dim: {channels} channels cannot be split into "
                    f"{self.heads(level)} heads"
                )
        if self.addition_embed_type not in (None, "text_time"):
            kind = self.addition_embed_type
            raise ValueError(f"addition_embed_type: {kind!r} is not supported, only 'text_time'")
        added = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type is not None and None in added:
            raise ValueError(
                "addition_time_embed_dim or projection_class_embeddings_input_dim: missing, though "
                f"addition_embed_type is {self.addition_embed_type!r}"
            )

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def temb_channels(self) -> int:
        """The length of the embedded timestep."""
        return 4 * self.block_out_channels[0]

    def heads(self, level: int) -> int:
        heads = self.attention_head_dim
        return heads[level] if isinstance(heads, tuple) else heads

    def depth(self, level: int) -> int:
        """How many transformer blocks follow each residual block of a level."""
        depth = self.transformer_layers_per_block
        return depth[level] if isinstance(depth, tuple) else depth

    def attends(self, level: int) -> bool:
        return self.down_block_types[level] == CROSS

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads `unet/config.json`. **Raises:** `ConfigError`."""
        down = fields.get("down_block_types", cls.down_block_types)
        up = tuple(str(name).replace("Down", "Up") for name in reversed(down))
        supported = {"_class_name": ("UNet2DConditionModel",), "up_block_types": (up,), **SUPPORTED}
        return parse_config(
            cls, fields, name="unet/config.json", supported=supported, ignored=IGNORED
        )
