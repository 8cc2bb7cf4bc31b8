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
from .pipeline import (
    Blueprint as Blueprint,
    Encoded as Encoded,
    Picture as Picture,
    Pipeline as Pipeline,
    Result as Result,
    generate as generate,
    generate_each as generate_each,
    load as load,
    open_model as open_model,
)
from .sampling import sample as sample
from .sharding import make_mesh as make_mesh


__version__ = importlib.metadata.version("eqxdiff")
