"""FLUX.1 dev and schnell."""

from typing import TYPE_CHECKING

from ..._lazy import lazy


if TYPE_CHECKING:
    from .conditioning import (
        FluxCondition as FluxCondition,
        patchify as patchify,
        positions as positions,
        unpatchify as unpatchify,
    )
    from .config import TransformerConfig as TransformerConfig
    from .network import Transformer as Transformer


_HOMES = {
    "conditioning": ("FluxCondition", "patchify", "positions", "unpatchify"),
    "config": ("TransformerConfig",),
    "network": ("Transformer",),
}

__getattr__ = lazy(__name__, _HOMES)
