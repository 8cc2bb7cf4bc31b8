"""A family of models as data: all that differs from family to family, for all that does not."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from ..checkpoint.form import Form
from ..checkpoint.table import TableFile
from ..sharding import Rule
from ._example import PublishedSizes
from ._files import PublishedFiles
from ._lora import LoraNames
from ._model import AbstractModel
from ._references import References
from ._settings import Settings


Configs = Mapping[str, Any]
"""The parsed config of each component, of the `"scheduler"` and of the `"pipeline"`."""


@dataclasses.dataclass(frozen=True)
class Component:
    """A part of a model with weights of its own: a folder of the published layout.

    **Fields:**

    - `parse`: reads the folder's `config.json` into a frozen config. Raises `ConfigError`.
    - `init`: makes a random module from `(config, *, key, dtype)`: a class method of the module's
        class, by which LoRAs find it in a model.
    - `forms`: the ways in which files name its tensors, the published one first.
    - `rules`: its sharding rules: every leaf of two or more dimensions matches exactly one.
    - `stage`: `"text"`, `"denoiser"` or `"vae"`. One stage runs at a time.
    """

    parse: Callable[[Mapping[str, Any]], Any]
    init: Callable[..., eqx.Module]
    forms: tuple[Form, ...]
    rules: Sequence[Rule]
    stage: str

    @property
    def table(self) -> TableFile:
        """The key table of its published layout."""
        return self.forms[0].table

    def skeleton(self, config: Any, dtype: DTypeLike = jnp.float32) -> Any:
        """Returns the module with `jax.ShapeDtypeStruct` leaves: it costs nothing at any size."""
        init = lambda key: self.init(config, key=key, dtype=dtype)
        return eqx.filter_eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model that users call by name: where its weights are and what it runs with by default.

    **Fields:**

    - `summary`: one line.
    - `repository`: in the diffusers layout.
    - `defaults`: what it runs with, an instance of the family's settings.
    - `parts`: component -> `REPOSITORY:FILE`, for components that are not the repository's own.
    - `controls`: the ControlNets that users call by name, and their repositories.
    - `embedded`: the folder that has its files, for a model that comes with a package.
    - `distilled`: for a model whose weights are made for a number of steps: the steps, and what is
        different for them.
    """

    summary: str
    repository: str
    defaults: Settings
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    controls: Mapping[str, str] = dataclasses.field(default_factory=dict)
    embedded: str | None = None
    distilled: Mapping[int, "Preset"] = dataclasses.field(default_factory=dict)

    @property
    def home(self) -> str:
        """Where its files are: the folder or the repository."""
        return self.embedded or self.repository


def no_sizes(model: str) -> PublishedSizes | None:
    """Stands for `Family.published` in a family that does not state them."""


def no_controlnets(configs: Configs, fields: Mapping[str, Any] | None) -> Any:
    """Stands for `Family.control_config` in a family without ControlNets."""
    raise NotImplementedError


def no_references(configs: Configs) -> References | None:
    """Stands for `Family.references` in a family that takes no reference pictures."""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """All that the loader, the converter, LoRAs and the command line know of a family.

    **Fields:**

    - `name`: that of its folder.
    - `settings`: its settings class, a frozen dataclass of fields made by `setting`.
    - `presets`: its models by name.
    - `components`: by folder name.
    - `tokenizers`: folder of a tokenizer -> the text encoder that it is for, whose config has a
        `vocab_size`.
    - `parse_index`: reads `model_index.json`. Raises `ConfigError` for classes of another family.
    - `parse_scheduler`: reads `scheduler/scheduler_config.json`. Raises `ConfigError`.
    - `bind`: makes the model of a name, of default settings and of configs. Raises `ConfigError`
        where the components do not belong together.
    - `example`: returns the texts of a tiny checkpoint of a model, by path: all but the weights.
    - `published`: returns the sizes of a model's published checkpoint, so that its needs are known
        without any file of it.
    - `files`: how its files are recognised, and what they hold besides components.
    - `lora`: how published LoRAs name its layers.
    - `controlnet`: the ControlNets that go with it, if there are any.
    - `control_config`: makes the config of a ControlNet for a model of these configs from its
        `config.json`, or from `None` where a file comes without. Raises `ConfigError`.
    - `references`: returns which reference pictures a model of these configs takes; `None` where it
        begins with one picture instead, of which a part is made anew.
    """

    name: str
    settings: type[Settings]
    presets: Mapping[str, Preset]
    components: Mapping[str, Component]
    tokenizers: Mapping[str, str]
    parse_index: Callable[[Mapping[str, Any]], Any]
    parse_scheduler: Callable[[Mapping[str, Any]], Any]
    bind: Callable[[str, Any, Configs], AbstractModel]
    example: Callable[[str], Mapping[str, str]]
    published: Callable[[str], PublishedSizes | None] = no_sizes
    files: PublishedFiles = dataclasses.field(default_factory=PublishedFiles)
    lora: LoraNames = dataclasses.field(default_factory=LoraNames)
    controlnet: Component | None = None
    control_config: Callable[[Configs, Mapping[str, Any] | None], Any] = no_controlnets
    references: Callable[[Configs], References | None] = no_references

    def __post_init__(self):
        if set(self.components) != set(self.settings.components):
            raise ValueError(f"The settings of {self.name} name other components than the family.")


def control_names(count: int) -> list[str]:
    """Names the components of so many ControlNets: `controlnet`, `controlnet_1` and so on."""
    return ["controlnet" if i == 0 else f"controlnet_{i}" for i in range(count)]
