"""Weights: key tables, strict loading leaf by leaf, and saving."""

from .export import export_infos as export_infos, export_tensors as export_tensors
from .hub import Source as Source, open_source as open_source
from .layout import describe as describe, find_pieces as find_pieces, locate as locate
from .load import check as check, leaf_paths as leaf_paths, load_module as load_module
from .part import Part as Part, open_part as open_part, open_weights as open_weights
from .safetensors import SafetensorsFile as SafetensorsFile
from .save import save_module as save_module
from .source import (
    AbstractTensorSource as AbstractTensorSource,
    InMemory as InMemory,
    TensorInfo as TensorInfo,
)
from .table import Table as Table, read_table as read_table
