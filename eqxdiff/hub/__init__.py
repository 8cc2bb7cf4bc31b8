"""Where files come from: folders, Hub repositories, single files, and parts of them."""

from .part import (
    Part as Part,
    Weights as Weights,
    is_file as is_file,
    open_part as open_part,
    open_weights as open_weights,
)
from .source import Source as Source, open_source as open_source
