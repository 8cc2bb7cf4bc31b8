"""Text-to-image diffusion models in JAX and Equinox."""

import importlib.metadata

from ._errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    EqxdiffError as EqxdiffError,
    PromptError as PromptError,
    SettingError as SettingError,
    SourceError as SourceError,
)
from .models import Settings as Settings, find_model as find_model, model_names as model_names
from .sampling import sample as sample
from .sharding import make_mesh as make_mesh


__version__ = importlib.metadata.version("eqxdiff")
