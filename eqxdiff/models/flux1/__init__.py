"""FLUX.1 dev and schnell."""

from .conditioning import Conditioning as Conditioning
from .config import TransformerConfig as TransformerConfig
from .family import (
    Flux1 as Flux1,
    patchify as patchify,
    positions as positions,
    unpatchify as unpatchify,
)
from .network import Transformer as Transformer
