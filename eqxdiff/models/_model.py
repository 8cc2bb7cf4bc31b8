"""A model: a family bound to the configs of one checkpoint. It holds no weights."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
from jaxtyping import Array, DTypeLike, Float, PyTree

from .._types import Scalar
from ..sampling import (
    AbstractGuider,
    AbstractParameterization,
    AbstractSolver,
    Interval,
    Network,
    Schedule,
)
from ..text import Tokenized, Tokenizer


Modules = Mapping[str, Any]
"""The loaded components, by name."""

PROMPT = "prompt"
"""The role of the condition that guidance leads to; a guider names the others, such as
`"negative"`."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt as the text encoders take it.

    **Fields:**

    - `tokens`: a PyTree of arrays of fixed shapes, which only the model looks into. Its static
        fields are compiled in.
    - `parts`: what each text encoder sees of the prompt, by the encoder's name.
    """

    tokens: PyTree
    parts: Mapping[str, Tokenized]


class Control(eqx.Module):
    """A picture of what to draw where, for one ControlNet.

    **Fields:**

    - `image`: RGB from 0 to 1, of the size of the picture to be made.
    - `scale`: how much it counts; 0 is off.
    - `interval`: the timesteps at which it acts.
    - `guess`: whether it acts on the prompt's condition alone, and the less the finer the layer, so
        that it can guide without a prompt.
    """

    image: Float[Array, "H W 3"]
    scale: Scalar
    interval: Interval
    guess: bool = eqx.field(static=True, default=False)


class Inputs(eqx.Module):
    """What a picture is made from besides its prompts. `None` or empty is absent.

    **Fields:**

    - `image`: the latent of the input picture.
    - `mask`: where the picture is made anew: 1, and 0 where it is kept; of the latent's size.
    - `masked`: the latent of the input picture without the masked part, for models that `inpaints`
        is true for.
    - `controls`: one for each ControlNet.
    - `references`: the latents of the pictures that an editing model looks at, in their own sizes.
    """

    image: Float[Array, "h w channels"] | None = None
    mask: Float[Array, "h w 1"] | None = None
    masked: Float[Array, "h w channels"] | None = None
    controls: tuple[Control, ...] = ()
    references: tuple[Float[Array, "_ _ channels"], ...] = ()


class Recipe(eqx.Module):
    """How one picture is sampled. All but `shape` may differ within a batch.

    **Fields:**

    - `shape`: height, width and channels of the latent.
    - `schedule`: the rows of noise levels, from the step that `strength` begins with.
    - `solver`: how to step from one row to the next.
    - `parameterization`: what the network predicts.
    - `guider`: which conditions the network is asked for, and how its answers are combined.
    """

    shape: tuple[int, int, int] = eqx.field(static=True)
    schedule: Schedule
    solver: AbstractSolver
    parameterization: AbstractParameterization
    guider: AbstractGuider


class AbstractModel(eqx.Module):
    """What the pipeline knows of a model: pure functions of one example.

    Fields are static and compare by value, so that two loads of one model are equal.

    - `name`: what errors call it.
    - `defaults`: the settings that hold where nothing else is given.
    """

    name: eqx.AbstractVar[str]
    defaults: eqx.AbstractVar[Any]

    @property
    @abc.abstractmethod
    def inpaints(self) -> bool:
        """Whether the network itself takes a mask and the masked picture. For other models the
        sampler blends the kept part into the latents."""

    @abc.abstractmethod
    def resolve(self, given: Mapping[str, Any]) -> Any:
        """Completes and checks the settings that a user gave: an instance of the family's class.

        **Raises:** `SettingError` where a setting is out of range or would be ignored.
        """

    @abc.abstractmethod
    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, settings: Any, role: str
    ) -> Text:
        """Tokenizes the texts of a role: of `PROMPT` the prompt, of others what the settings say.

        **Raises:** `PromptError`.
        """

    @abc.abstractmethod
    def encode(self, modules: Modules, tokens: PyTree, dtype: DTypeLike) -> PyTree:
        """Runs the text encoders, which compute in `dtype`."""

    @abc.abstractmethod
    def condition(self, encoded: PyTree, settings: Any, role: str) -> PyTree:
        """Returns the condition of a role: arrays, of equal shapes for all roles."""

    @abc.abstractmethod
    def shared(self, inputs: Inputs, settings: Any) -> PyTree:
        """Returns what the network is told of a picture besides its conditions, as arrays."""

    @abc.abstractmethod
    def network(self, modules: Modules, shared: PyTree, dtype: DTypeLike) -> Network:
        """Returns the network of one picture. It computes in `dtype`; the latent stays float32.

        **Arguments:**

        - `modules`: those of the denoiser's stage.
        - `shared`: what `shared` returned.
        """

    @abc.abstractmethod
    def recipe(self, settings: Any) -> Recipe:
        """Returns how to sample with these settings. **Raises:** `SettingError`."""

    @abc.abstractmethod
    def to_latent(
        self,
        modules: Modules,
        image: Float[Array, "H W 3"],
        noise: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "h w channels"]:
        """Encodes a picture of values from -1 to 1 to a latent of about unit variance.

        **Arguments:**

        - `noise`: unit noise, for autoencoders that sample.
        """

    @abc.abstractmethod
    def to_image(
        self,
        modules: Modules,
        latent: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "H W 3"]:
        """Decodes a latent to a picture of values from 0 to 1."""
