import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ..._config import parse_config


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a FLUX.1 transformer, named as in `transformer/config.json`."""

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope: {self.axes_dims_rope} does not add up to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if len(self.axes_dims_rope) != 3 or any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope: {self.axes_dims_rope} is not three even numbers")
        if self.in_channels % 4 or self.out_channels not in (None, self.in_channels):
            raise ValueError("in_channels must be a multiple of 4 and equal out_channels")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads `transformer/config.json`. **Raises:** `ConfigError`."""
        return parse_config(
            cls,
            fields,
            name="transformer/config.json",
            supported={"patch_size": (1,), "_class_name": ("FluxTransformer2DModel",)},
        )
