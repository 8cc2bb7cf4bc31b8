"""Files of tensors, read lazily: this room knows no model."""

from .open import open_tensors as open_tensors
from .pickles import PICKLES as PICKLES
from .safetensors import SafetensorsFile as SafetensorsFile
from .scaled import dequantised as dequantised
from .source import (
    AbstractTensorSource as AbstractTensorSource,
    Box as Box,
    InMemory as InMemory,
    Subset as Subset,
    TensorInfo as TensorInfo,
    show as show,
)
