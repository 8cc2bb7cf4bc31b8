"""The models: a folder a family, and the registry of them all."""

from typing import TYPE_CHECKING

from .._lazy import lazy


if TYPE_CHECKING:
    from .._config import parse_config as parse_config
    from ._example import (
        PublishedSizes as PublishedSizes,
        read_example as read_example,
        read_published as read_published,
    )
    from ._family import (
        Component as Component,
        Configs as Configs,
        Family as Family,
        Preset as Preset,
        control_names as control_names,
    )
    from ._files import Lookalikes as Lookalikes, PublishedFiles as PublishedFiles
    from ._index import read_index as read_index
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
    from ._plugins import settings_classes as settings_classes
    from ._recipe import guider_of as guider_of, spread as spread
    from ._references import References as References
    from ._registry import (
        FAMILIES as FAMILIES,
        families as families,
        find_model as find_model,
        model_names as model_names,
    )
    from ._settings import (
        Declaration as Declaration,
        GuidedSettings as GuidedSettings,
        SampledSettings as SampledSettings,
        Settings as Settings,
        TiledSettings as TiledSettings,
        applied as applied,
        check_guided as check_guided,
        check_range as check_range,
        check_size as check_size,
        complete as complete,
        declarations as declarations,
        image_step as image_step,
        own_names as own_names,
        setting as setting,
        tiles as tiles,
    )


# Imported when first asked for: the command line shows the settings without waiting for JAX.
_HOMES = {
    "._config": ("parse_config",),
    "_example": ("PublishedSizes", "read_example", "read_published"),
    "_family": (
        "Component",
        "Configs",
        "Family",
        "Preset",
        "control_names",
    ),
    "_files": ("Lookalikes", "PublishedFiles"),
    "_index": ("read_index",),
    "_lora": (
        "LoraBase",
        "LoraFormat",
        "LoraNames",
    ),
    "_model": (
        "PROMPT",
        "AbstractModel",
        "Control",
        "Inputs",
        "Modules",
        "Recipe",
        "Text",
    ),
    "_settings": (
        "Declaration",
        "GuidedSettings",
        "SampledSettings",
        "Settings",
        "TiledSettings",
        "applied",
        "check_guided",
        "check_range",
        "check_size",
        "complete",
        "declarations",
        "image_step",
        "own_names",
        "setting",
        "tiles",
    ),
    "_references": ("References",),
    "_recipe": ("guider_of", "spread"),
    "_registry": (
        "FAMILIES",
        "families",
        "find_model",
        "model_names",
    ),
    "_plugins": ("settings_classes",),
}

__getattr__ = lazy(__name__, _HOMES)
