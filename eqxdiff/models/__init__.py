"""The models: a folder a family, and the registry of them all."""

import difflib
import importlib.metadata

from .._errors import SettingError
from ._family import (
    Component as Component,
    Configs as Configs,
    Family as Family,
    Preset as Preset,
    control_names as control_names,
)
from ._lora import (
    LoraBase as LoraBase,
    LoraFormat as LoraFormat,
    LoraNames as LoraNames,
)
from ._model import (
    PROMPT as PROMPT,
    AbstractModel as AbstractModel,
    Control as Control,
    Inputs as Inputs,
    Modules as Modules,
    Recipe as Recipe,
    Text as Text,
)
from ._settings import (
    Declaration as Declaration,
    GuidedSettings as GuidedSettings,
    SampledSettings as SampledSettings,
    Settings as Settings,
    applied as applied,
    check_range as check_range,
    complete as complete,
    declarations as declarations,
    setting as setting,
)
from .flux1 import FLUX1
from .sd import STABLE_DIFFUSION
from .sdxl import STABLE_DIFFUSION_XL


FAMILIES: tuple[Family, ...] = (FLUX1, STABLE_DIFFUSION, STABLE_DIFFUSION_XL)
"""The families of this package, in the order of their tables."""

ENTRY_POINTS = "eqxdiff.families"
"""The group of entry points by which other packages offer a `Family`."""


def families() -> tuple[Family, ...]:
    """Returns the families of this package and then those of other installed packages.

    **Raises:** `SettingError` where an entry point is no `Family`.
    """
    others = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        family = entry.load()
        if not isinstance(family, Family):
            raise SettingError(f"The entry point {entry.value} is no eqxdiff Family.")
        others.append(family)
    return (*FAMILIES, *others)


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
