"""The family bound to the configs of one checkpoint: pure functions of one picture."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from eqxdiff import ConfigError
from eqxdiff.models import (
    PROMPT,
    AbstractModel,
    Configs,
    Inputs,
    Modules,
    Recipe,
    Text,
    check_guided,
    check_size,
    complete,
    guider_of,
    image_step,
)
from eqxdiff.sampling import Euler, Flow, FlowSchedulerConfig, Row, Unguided, flow_sigmas
from eqxdiff.text import Tokenizer

from .config import PressConfig
from .network import Painter
from .settings import SketchSettings


class SketchText(eqx.Module):
    """A prompt: first as token ids, and as the states of the tokens once it is encoded.

    **Fields:**

    - `mask`: which of the tokens are not padding.
    """

    tokens: Int[Array, " words"] | Float[Array, "words dim"]
    mask: Bool[Array, " words"]


class SketchPredictor(eqx.Module):
    """The denoiser as the samplers call it: `(latent, row, condition) -> velocity`."""

    painter: Painter
    boldness: Float[Array, ""]
    dtype: DTypeLike = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "h w channels"], row: Row, condition: SketchText
    ) -> Float[Array, "h w channels"]:
        text = condition.tokens.astype(self.dtype)
        velocity = self.painter(
            x.astype(self.dtype), row.timestep, self.boldness, text, condition.mask
        )
        return velocity.astype(x.dtype)


class SketchModel(AbstractModel):
    """A sketch model. Its fields compare by value, so that two loads of a model are equal."""

    name: str = eqx.field(static=True)
    defaults: SketchSettings = eqx.field(static=True)
    press: PressConfig = eqx.field(static=True)
    scheduler: FlowSchedulerConfig = eqx.field(static=True)

    @property
    def inpaints(self) -> bool:
        return False

    def resolve(self, given: Mapping[str, Any]) -> SketchSettings:
        settings = complete(SketchSettings, given, self.defaults, self.name)
        check_size(settings, self.press.patch)
        if not guides(settings):
            check_guided(given, SketchSettings, self.name, "guidance")
        self.recipe(settings)
        return settings

    def tokenize(
        self, tokenizers: Mapping[str, Tokenizer], prompt: str, settings: SketchSettings, role: str
    ) -> Text:
        text = prompt if role == PROMPT else settings.negative_prompt or ""
        part = tokenizers["letters"].encode(text, settings.words)
        mask = jnp.arange(settings.words) < part.length
        return Text(SketchText(jnp.asarray(part.ids), mask), {"scribe": part})

    def encode(self, modules: Modules, tokens: SketchText, dtype: DTypeLike) -> SketchText:
        states = modules["scribe"](tokens.tokens, tokens.mask, dtype=dtype)
        return SketchText(states, tokens.mask)

    def condition(self, encoded: SketchText, settings: SketchSettings, role: str) -> SketchText:
        return encoded

    def shared(self, inputs: Inputs, settings: SketchSettings) -> Float[Array, ""]:
        return jnp.asarray(settings.boldness, jnp.float32)

    def network(
        self, modules: Modules, shared: Float[Array, ""], dtype: DTypeLike
    ) -> SketchPredictor:
        return SketchPredictor(modules["painter"], shared, jnp.dtype(dtype))

    def recipe(self, settings: SketchSettings) -> Recipe:
        patch = self.press.patch
        shape = settings.height // patch, settings.width // patch, self.press.channels
        schedule = flow_sigmas(self.scheduler, settings.steps).since(image_step(settings))
        guider = Unguided()
        if guides(settings):
            guider = guider_of(settings, settings.guidance, schedule)
        return Recipe(shape, schedule, Euler(), Flow(), guider)

    def to_latent(
        self,
        modules: Modules,
        image: Float[Array, "H W 3"],
        noise: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "h w channels"]:
        return modules["press"].encode(image.astype(dtype)).astype(jnp.float32)

    def to_image(
        self,
        modules: Modules,
        latent: Float[Array, "h w channels"],
        dtype: DTypeLike,
        *,
        tiled: bool,
    ) -> Float[Array, "H W 3"]:
        image = modules["press"].decode(latent.astype(dtype)).astype(jnp.float32)
        return jnp.clip(image / 2 + 0.5, 0, 1)


def guides(settings: SketchSettings) -> bool:
    """Returns whether classifier-free guidance is on."""
    return settings.guidance is not None and settings.guidance > 1


def bind(name: str, defaults: SketchSettings, configs: Configs) -> SketchModel:
    """Makes the model of a checkpoint. **Raises:** `ConfigError` where its parts do not fit."""
    scribe, painter, press = configs["scribe"], configs["painter"], configs["press"]
    if painter.text_dim != scribe.dim:
        raise ConfigError(f"The painter's text_dim {painter.text_dim} is not {scribe.dim}.")
    if painter.channels != press.channels:
        raise ConfigError(f"The painter's channels {painter.channels} are not {press.channels}.")
    return SketchModel(name, defaults, press, configs["scheduler"])
