"""LoRA and its relatives: file formats to deltas, merged into a model or applied at run time."""

from .adapter import Adapter as Adapter, Patch as Patch, parse_adapter as parse_adapter
from .base import guess_base as guess_base
from .components import AdaptedComponent as AdaptedComponent, find_components as find_components
from .extract import Extracted as Extracted, extract as extract
from .fit import Adapters as Adapters, fit as fit
from .fitted import Fitted as Fitted, Report as Report
from .merge import merge as merge, merge_fitted as merge_fitted, unmerge as unmerge
from .merger import Merger as Merger
from .runtime import (
    adapted_layers as adapted_layers,
    adapter_leaves as adapter_leaves,
    apply as apply,
    apply_fitted as apply_fitted,
    ensemble as ensemble,
    remove as remove,
    rescale as rescale,
    swap as swap,
)
from .source import load as load
from .strength import Strength as Strength, split_spec as split_spec
