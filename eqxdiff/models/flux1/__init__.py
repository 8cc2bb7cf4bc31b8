"""FLUX.1 dev and schnell."""

from .conditioning import (
    FluxCondition as FluxCondition,
    patchify as patchify,
    positions as positions,
    unpatchify as unpatchify,
)
from .config import TransformerConfig as TransformerConfig
from .family import FLUX1 as FLUX1
from .network import Transformer as Transformer
