"""A guess which model an adapter is for, by the widths of the layers that it changes."""

import re
from collections.abc import Sequence

from .adapter import Adapter
from .components import NamedFamily, every_family


def guess_base(adapter: Adapter, families: Sequence[NamedFamily] | None = None) -> str:
    """Returns the name of the first model that some patch fits; `"unknown"` where none does.

    **Arguments:**

    - `families`: the families whose models are considered; all by default.
    """
    for base in (base for family in every_family(families) for base in family.lora.bases):
        for patch in adapter.patches:
            inputs = (patch.shape or ())[1:2]
            if re.search(base.modules, patch.module) and base.inputs in (None, *inputs):
                return base.name
    return "unknown"
