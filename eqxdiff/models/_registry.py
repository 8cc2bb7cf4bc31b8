"""All families: those of this package, and those that other installed packages offer."""

import difflib

from .._errors import SettingError
from ._family import Family, Preset
from ._plugins import plugins
from .flux1.family import FLUX1
from .flux2.family import FLUX2
from .sd.family import STABLE_DIFFUSION
from .sdxl.family import STABLE_DIFFUSION_XL


FAMILIES: tuple[Family, ...] = (FLUX1, FLUX2, STABLE_DIFFUSION, STABLE_DIFFUSION_XL)
"""The families of this package, in the order of their tables."""


def families() -> tuple[Family, ...]:
    """Returns the families of this package and then those of other installed packages.

    **Raises:** `SettingError` where another package offers something else.
    """
    return (*FAMILIES, *plugins())


def model_names() -> list[str]:
    """Returns the names of all models."""
    return [name for family in families() for name in family.presets]


def find_model(name: str) -> tuple[Family, Preset]:
    """Finds a model by its name. **Raises:** `SettingError`, with the nearest name."""
    for family in families():
        if name in family.presets:
            return family, family.presets[name]
    near = difflib.get_close_matches(name.lower(), model_names(), 1, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise SettingError(
        f"There is no model called {name!r}.{hint} The models are {', '.join(model_names())}."
    )
