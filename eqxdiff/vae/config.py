import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from .._config import parse_config


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """The sizes and constants of a KL autoencoder, named as in `vae/config.json`.

    The defaults are those of the fields that older files leave out. `force_upcast` says that the
    model was not made for float16; it changes nothing here, callers decide on the dtype by it.
    """

    block_out_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        if not self.block_out_channels:
            raise ValueError("block_out_channels: an empty list")
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name}: {value} is below 1")
        for channels in self.block_out_channels:
            if channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {channels} channels cannot be split into "
                    f"norm_num_groups: {self.norm_num_groups} groups"
                )
        if self.scaling_factor == 0:
            raise ValueError("scaling_factor: 0")

    @property
    def downscale(self) -> int:
        """How many pixels a latent pixel stands for, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads `vae/config.json`. **Raises:** `ConfigError`."""
        channels = fields.get("block_out_channels")
        levels = len(channels) if isinstance(channels, list | tuple) else 0
        return parse_config(
            cls,
            fields,
            name="vae/config.json",
            supported={
                "_class_name": ("AutoencoderKL",),
                "act_fn": ("silu",),
                "down_block_types": (("DownEncoderBlock2D",) * levels,),
                "up_block_types": (("UpDecoderBlock2D",) * levels,),
                "latents_mean": (None,),
                "latents_std": (None,),
            },
            ignored=("sample_size",),
        )
