"""Text-to-image diffusion models in JAX and Equinox."""

import importlib.metadata
from typing import TYPE_CHECKING

from ._errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    EqxdiffError as EqxdiffError,
    HostsError as HostsError,
    PromptError as PromptError,
    SettingError as SettingError,
    SourceError as SourceError,
)
from ._lazy import lazy


if TYPE_CHECKING:
    from . import bulk as bulk, distributed as distributed, lora as lora
    from .models import (
        Family as Family,
        Settings as Settings,
        find_model as find_model,
        model_names as model_names,
    )
    from .pipeline import (
        Blueprint as Blueprint,
        ControlImage as ControlImage,
        CutPromptWarning as CutPromptWarning,
        Encoded as Encoded,
        Example as Example,
        Picture as Picture,
        Pipeline as Pipeline,
        Request as Request,
        Result as Result,
        Stages as Stages,
        decode as decode,
        generate as generate,
        generate_each as generate_each,
        load as load,
        open_model as open_model,
        prepare as prepare,
        sample_latent as sample_latent,
        steps as steps,
    )
    from .sampling import Hook as Hook, sample as sample
    from .sharding import make_mesh as make_mesh


__version__ = importlib.metadata.version("eqxdiff")

# Imported when first asked for: JAX takes a second, for which `eqxdiff --help` need not wait.
_HOMES = {
    "bulk": (),
    "distributed": (),
    "lora": (),
    "models": ("Family", "Settings", "find_model", "model_names"),
    "pipeline": (
        *("Blueprint", "ControlImage", "CutPromptWarning", "Encoded", "Example", "Picture"),
        *("Pipeline", "Request", "Result", "Stages", "decode", "generate", "generate_each"),
        *("load", "open_model", "prepare", "sample_latent", "steps"),
    ),
    "sampling": ("Hook", "sample"),
    "sharding": ("make_mesh",),
}


__getattr__ = lazy(__name__, _HOMES)


__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]
    {
        *("CheckpointError", "ConfigError", "EqxdiffError", "HostsError"),
        *("PromptError", "SettingError", "SourceError"),
        *(home for home, names in _HOMES.items() if not names),
        *(name for names in _HOMES.values() for name in names),
    }
)


def __dir__() -> list[str]:
    return __all__
