"""FLUX.2 [klein], distilled and base."""

from typing import TYPE_CHECKING

from ..._lazy import lazy


if TYPE_CHECKING:
    from .autoencoder import AutoencoderKLFlux2 as AutoencoderKLFlux2
    from .config import (
        AutoencoderKLFlux2Config as AutoencoderKLFlux2Config,
        Flux2TransformerConfig as Flux2TransformerConfig,
    )
    from .network import Flux2Transformer as Flux2Transformer


_HOMES = {
    "autoencoder": ("AutoencoderKLFlux2",),
    "config": ("AutoencoderKLFlux2Config", "Flux2TransformerConfig"),
    "network": ("Flux2Transformer",),
}

__getattr__ = lazy(__name__, _HOMES)
