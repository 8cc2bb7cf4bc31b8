"""What other installed packages offer, and the settings of all families. This needs no JAX."""

import importlib.metadata
from typing import TYPE_CHECKING

from .._errors import SettingError
from ._settings import Settings
from .flux1.settings import FluxSettings
from .sdxl.settings import SDXLSettings
from .unet.settings import UNetSettings


if TYPE_CHECKING:
    from ._family import Family


ENTRY_POINTS = "eqxdiff.families"
"""The group of entry points by which other packages offer a `Family`."""


def plugins() -> "list[Family]":
    """Loads the families of other packages, by their entry points.

    **Raises:** `SettingError` where an entry point cannot be loaded or is no `Family`.
    """
    families = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        from ._family import Family  # which imports JAX, as the families of other packages do

        try:
            family = entry.load()
        except Exception as error:  # anything may go wrong in another package
            raise SettingError(
                f"The entry point {entry.value} cannot be loaded: {error}."
            ) from error
        if not isinstance(family, Family):
            raise SettingError(f"The entry point {entry.value} is no eqxdiff Family.")
        families.append(family)
    return families


def settings_classes() -> tuple[type[Settings], ...]:
    """Returns the settings class of each family. **Raises:** `SettingError`."""
    others = (family.settings for family in plugins())
    return (FluxSettings, UNetSettings, SDXLSettings, *others)
