"""The contract between a family of models and everything that runs it."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PyTree

from .._types import Scalar, Tokens
from ..checkpoint.form import Form
from ..checkpoint.table import TableFile
from ..sampling import AbstractParameterization, AbstractSolver, Denoiser, Schedule
from ..sharding import Rule
from ..text import Tokenized, Tokenizer
from ._files import PublishedFiles
from ._settings import Settings


Configs = Mapping[str, Any]
"""The parsed config of each component, of the `"scheduler"` and of the `"pipeline"`."""

Modules = Mapping[str, Any]
"""The loaded components, by name."""


@dataclasses.dataclass(frozen=True)
class Component:
    """A part of a family with weights of its own: a folder of the published layout.

    **Fields:**

    - `parse`: the folder's `config.json` to a frozen config. Raises `ConfigError`.
    - `init`: `(config, *, key, dtype)` to a random module.
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
        """The module with `jax.ShapeDtypeStruct` leaves, which costs nothing at any size."""
        init = lambda key: self.init(config, key=key, dtype=dtype)
        return eqx.filter_eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model that users call by name: where its weights are and what it runs with by default.

    **Fields:**

    - `summary`: one line.
    - `repository`: in the diffusers layout.
    - `defaults`: what it runs with.
    - `parts`: component -> `REPOSITORY:FILE`, for those that are not the repository's own.
    - `controls`: the ControlNets that users call by name, and their repositories.
    - `embedded`: the folder in this package that has its files, for a model that comes with it.
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


class Guidance(eqx.Module):
    """The scales of guidance, traced. What is `None` is off and costs nothing.

    **Fields:**

    - `embedded`: told to the network.
    - `classifier_free`: how far to go from the unconditional to the conditional prediction.
    - `rescale`: how far guidance goes back to the unguided contrast.
    - `sequential`: whether it takes two calls of the network on one example.
    """

    embedded: Scalar | None
    classifier_free: Scalar | None
    rescale: Scalar | None = None
    sequential: bool = eqx.field(static=True, default=False)


class Control(eqx.Module):
    """A picture of what to draw where, for one ControlNet.

    **Fields:**

    - `image`: RGB from 0 to 1, of the size of the picture to be made.
    - `scale`: how much it counts; 0 is off.
    - `first`, `last`: it acts from the first timestep, included, down to the last, excluded.
    - `guess`: whether it acts on the conditional prediction alone, the less the finer the layer, so
        that it guides where there is no prompt.
    """

    image: Float[Array, "H W 3"]
    scale: Scalar
    first: Scalar
    last: Scalar
    guess: bool = eqx.field(static=True, default=False)


def control_names(count: int) -> list[str]:
    """The components of so many ControlNets: `controlnet`, `controlnet_1` and so on."""
    return ["controlnet" if i == 0 else f"controlnet_{i}" for i in range(count)]


class AbstractFamily(eqx.Module):
    """All that the pipeline, the loader and the command line know of a family of models.

    - `presets`: its models by name.
    - `components`: by folder name.
    - `tokenizers`: folder of a tokenizer -> the text encoder that it is for.
    - `honoured`: the fields of `Settings` that count; another that is given is an error.
    - `controlnet`: the ControlNets that go with it, if there are any.
    - `files`: how its published files look.

    A family has no fields: it is a set of pure functions. Everything works on one example; the
    batch is the caller's `jax.vmap`.
    """

    presets: eqx.AbstractClassVar[Mapping[str, Preset]]
    components: eqx.AbstractClassVar[Mapping[str, Component]]
    tokenizers: eqx.AbstractClassVar[Mapping[str, str]]
    honoured: eqx.AbstractClassVar[Sequence[str]]
    controlnet: eqx.AbstractClassVar[Component | None]
    files: eqx.AbstractClassVar[PublishedFiles]

    @abstractmethod
    def parse_scheduler(self, fields: Mapping[str, Any]) -> Any:
        """Reads `scheduler/scheduler_config.json`. **Raises:** `ConfigError`."""

    @abstractmethod
    def parse_index(self, fields: Mapping[str, Any]) -> Any:
        """Reads `model_index.json`. **Raises:** `ConfigError`."""

    @abstractmethod
    def check(self, configs: Configs) -> None:
        """Compares the components with each other. **Raises:** `ConfigError`."""

    @abstractmethod
    def control_config(self, configs: Configs, fields: Mapping[str, Any] | None) -> Any:
        """The config of a ControlNet for a model of these configs.

        **Arguments:**

        - `fields`: its `config.json`; `None` where a file comes without.

        **Raises:** `ConfigError`, also where it is for another model.
        """

    @abstractmethod
    def resolve(
        self, given: Mapping[str, Any], model: str, defaults: Settings, configs: Configs
    ) -> Settings:
        """What a user gave (fields of `Settings`), completed by the defaults and the configs.

        **Arguments:**

        - `model`: what errors call it.

        **Raises:** `SettingError` where a setting is out of range or would be ignored.
        """

    @abstractmethod
    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, prompt_2: str, settings: Settings
    ) -> dict[str, Tokenized]:
        """The tokens for each text encoder, by the encoder's name, padded to a fixed length."""

    @abstractmethod
    def encode(
        self, modules: Modules, tokens: Mapping[str, Tokens], clip_skip: int, dtype: DTypeLike
    ) -> PyTree:
        """Tokens to hidden states, a PyTree that only this family looks into."""

    @abstractmethod
    def absent(self, configs: Configs, encoded: PyTree) -> PyTree:
        """What stands for a negative prompt that is not given; `encoded` is the empty text's."""

    @abstractmethod
    def condition(self, settings: Settings, encoded: PyTree, *, negative: bool) -> PyTree:
        """The conditioning: what `encode` returned, and what the settings say besides the prompts.

        **Arguments:**

        - `negative`: whether it is what guidance leads away from.
        """

    @abstractmethod
    def latent_shape(self, configs: Configs, settings: Settings) -> tuple[int, int, int]:
        """Height, width and channels of the latent."""

    @abstractmethod
    def schedule(self, configs: Configs, settings: Settings) -> Schedule:
        """The rows of noise levels for the step count and size."""

    @abstractmethod
    def solver(self, configs: Configs, settings: Settings) -> AbstractSolver:
        """The solver that the settings or the checkpoint name."""

    @abstractmethod
    def guidance(self, configs: Configs, settings: Settings) -> Guidance:
        """The scales as arrays; what is off is `None`."""

    @abstractmethod
    def denoiser(
        self,
        modules: Modules,
        conditional: PyTree,
        unconditional: PyTree | None,
        guidance: Guidance,
        controls: Sequence[Control],
        parameterization: AbstractParameterization,
        dtype: DTypeLike,
    ) -> Denoiser:
        """The denoiser of one latent. `unconditional` is `None` without classifier-free guidance.

        The network computes in `dtype`; the latent stays in at least float32.

        **Arguments:**

        - `modules`: with a ControlNet for each control, by `control_names`.
        """

    @abstractmethod
    def parameterization(self, configs: Configs, settings: Settings) -> AbstractParameterization:
        """What the network predicts."""

    @abstractmethod
    def decode_dtype(self, configs: Configs, dtype: DTypeLike) -> DTypeLike:
        """The dtype to decode in where the network computes in `dtype`."""

    @abstractmethod
    def example(self, model: str) -> Mapping[str, str]:
        """The texts of a tiny checkpoint in the published layout, by path: all but the weights."""
