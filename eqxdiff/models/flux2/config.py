import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ..._config import parse_config
from ..._errors import ConfigError
from ...vae import AutoencoderKLConfig


@dataclasses.dataclass(frozen=True)
class Flux2TransformerConfig:
    """The sizes of a FLUX.2 transformer, named as in `transformer/config.json`."""

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope: {self.axes_dims_rope} does not add up to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if len(self.axes_dims_rope) != 4 or any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope: {self.axes_dims_rope} is not four even numbers")
        if self.out_channels not in (None, self.in_channels):
            raise ValueError("out_channels must equal in_channels")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """The width between the two projections of an MLP."""
        return int(self.dim * self.mlp_ratio)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads `transformer/config.json`. **Raises:** `ConfigError`."""
        return parse_config(
            cls,
            fields,
            name="transformer/config.json",
            supported={"patch_size": (1,), "_class_name": ("Flux2Transformer2DModel",)},
        )


@dataclasses.dataclass(frozen=True)
class AutoencoderKLFlux2Config:
    """The sizes of FLUX.2's autoencoder: those of a KL autoencoder, and the statistics' epsilon.

    - `kl`: the sizes of encoder and decoder.
    - `batch_norm_eps`: is added to the variance of the latents.
    """

    kl: AutoencoderKLConfig
    batch_norm_eps: float = 1e-4

    @property
    def channels(self) -> int:
        """The channels of a latent in patches."""
        return PATCH**2 * self.kl.latent_channels

    @property
    def downscale(self) -> int:
        """How many pixels a patch stands for, in each direction."""
        return PATCH * self.kl.downscale

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads `vae/config.json`. **Raises:** `ConfigError`."""
        own = {"_class_name", *_FLUX2}
        kl = {"_class_name": "AutoencoderKL", **_DEFAULTS, "scaling_factor": 1.0}
        sizes = {name: value for name, value in fields.items() if name not in own}
        if unknown := {"scaling_factor", "shift_factor"} & set(sizes):
            raise ConfigError(f"vae/config.json: {min(unknown)} is no field of this autoencoder.")
        eps = parse_config(
            _BatchNorm,
            {name: value for name, value in fields.items() if name in own},
            name="vae/config.json",
            supported={
                "_class_name": ("AutoencoderKLFlux2",),
                "patch_size": ((PATCH, PATCH),),
                "decoder_block_out_channels": (None,),
            },
            ignored=("batch_norm_momentum",),
        ).batch_norm_eps
        return cls(AutoencoderKLConfig.parse({**kl, **sizes}), eps)


PATCH = 2

_FLUX2 = ("batch_norm_eps", "batch_norm_momentum", "patch_size", "decoder_block_out_channels")
_DEFAULTS = {
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 32,
    "layers_per_block": 2,
}


@dataclasses.dataclass(frozen=True)
class _BatchNorm:
    batch_norm_eps: float = 1e-4
