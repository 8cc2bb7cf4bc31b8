"""The models: a folder a family, and the registry of them all."""

import difflib

from .._errors import SettingError
from ._family import (
    AbstractFamily as AbstractFamily,
    Component as Component,
    Control as Control,
    Guidance as Guidance,
    Modules as Modules,
    Preset as Preset,
    control_names as control_names,
)
from ._files import Lookalikes as Lookalikes, PublishedFiles as PublishedFiles
from ._settings import Settings as Settings, check_range as check_range
from .flux1 import Flux1
from .sd import StableDiffusion
from .sdxl import StableDiffusionXL


FAMILIES: tuple[AbstractFamily, ...] = (Flux1(), StableDiffusion(), StableDiffusionXL())


def model_names() -> list[str]:
    """The names of all models."""
    return [name for family in FAMILIES for name in family.presets]


def find_model(name: str) -> tuple[AbstractFamily, Preset]:
    """A model by name. **Raises:** `SettingError`, with the nearest name."""
    for family in FAMILIES:
        if name in family.presets:
            return family, family.presets[name]
    near = difflib.get_close_matches(name, model_names(), 1, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise SettingError(
        f"There is no model called {name!r}.{hint} The models are {', '.join(model_names())}."
    )
