"""What other installed packages offer, and the settings of all families. This needs no JAX."""

import importlib.metadata
from typing import Any

from ._settings import Settings
from .flux1.settings import FluxSettings
from .sdxl.settings import SDXLSettings
from .unet.settings import UNetSettings


ENTRY_POINTS = "eqxdiff.families"
"""The group of entry points by which other packages offer a `Family`."""


def plugins() -> dict[str, Any]:
    """Loads the families of other packages, by their entry points."""
    entries = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {entry.value: entry.load() for entry in entries}


def settings_classes() -> tuple[type[Settings], ...]:
    """Returns the settings class of each family."""
    others = (family.settings for family in plugins().values())
    return (FluxSettings, UNetSettings, SDXLSettings, *others)
