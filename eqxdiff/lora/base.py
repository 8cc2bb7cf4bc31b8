"""Which model an adapter is for, guessed from the widths of what it changes."""

import re

from .adapter import Adapter


BASES: tuple[tuple[str, str, int | None], ...] = (
    ("FLUX.1", r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d+[._]", 3072),
    ("a model like FLUX.1", r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d", None),
    ("SDXL", r"attn2[._](processor[._])?to_[kv]$", 2048),
    ("SDXL refiner", r"attn2[._](processor[._])?to_[kv]$", 1280),
    ("SD 2", r"attn2[._](processor[._])?to_[kv]$", 1024),
    ("SD 1.5", r"attn2[._](processor[._])?to_[kv]$", 768),
    ("SDXL", r"(text_encoder_2|te2|clip_g)[._].*self_attn", 1280),
    ("SD 2", r"^(text_encoder|lora_te)[._].*self_attn", 1024),
)
"""A model, names of modules that it has, and how many inputs these have."""


def guess_base(adapter: Adapter) -> str:
    """The first model that some patch speaks for; `"unknown"` where none does."""
    for base, pattern, width in BASES:
        for patch in adapter.patches:
            shape = patch.shape or ()
            if re.search(pattern, patch.module) and (width is None or shape[1:2] == (width,)):
                return base
    return "unknown"
