"""The engine: key tables, strict loading leaf by leaf, and saving. It knows no model."""

from .export import export_infos as export_infos, export_tensors as export_tensors
from .form import Form as Form
from .load import (
    FILE as FILE,
    check as check,
    leaf_paths as leaf_paths,
    load_module as load_module,
    loaded_shapes as loaded_shapes,
)
from .plan import Shape as Shape
from .save import save_module as save_module
from .table import Table as Table, TableFile as TableFile, read_table as read_table
