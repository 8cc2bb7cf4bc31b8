"""Prompts to what the denoiser is told of them."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..models import PROMPT, Modules, Text
from .blueprint import Blueprint


class CutPromptWarning(UserWarning):
    """A text encoder sees only the beginning of a prompt."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """The end of a prompt, for which a text encoder has no room.

    **Fields:**

    - `what`: which prompt it is, such as `"prompt 2"`.
    - `encoder`: the text encoder.
    - `tokens`: how many tokens it takes.
    - `dropped`: the text that it does not see.
    """

    what: str
    encoder: str
    tokens: int
    dropped: str

    def __str__(self) -> str:
        return (
            f"{self.what} is too long for {self.encoder}, which takes {self.tokens} tokens; "
            f"this is dropped: {self.dropped!r}"
        )


class Encoded(eqx.Module):
    """Prompts as the denoiser sees them.

    **Fields:**

    - `roles`: what the text encoders say, by role, such as `"prompt"` and `"negative"`: one row for
        each prompt.
    - `prompts`: the texts.
    - `dropped`: for each prompt, what was cut off its end.
    """

    roles: dict[str, PyTree]
    prompts: tuple[str, ...] = eqx.field(static=True)
    dropped: tuple[str, ...] = eqx.field(static=True)

    def __getitem__(self, index: int) -> "Encoded":
        """Returns one of the prompts."""
        rows = jax.tree.map(lambda leaf: leaf[index : index + 1], self.roles)
        return Encoded(rows, (self.prompts[index],), (self.dropped[index],))


def tokenize(
    blueprint: Blueprint, prompt: str, settings: Any, roles: Sequence[str]
) -> dict[str, Text]:
    """Tokenizes the texts of each role. **Raises:** `PromptError`."""
    model, tokenizers = blueprint.model, blueprint.tokenizers
    return {role: model.tokenize(tokenizers, prompt, settings, role) for role in roles}


def warn_of_cuts(found: Sequence[Cut]) -> None:
    """Warns of prompts that text encoders see only the beginning of."""
    for cut in found:
        warnings.warn(str(cut), CutPromptWarning, stacklevel=3)


def encode_prompts(
    blueprint: Blueprint, modules: Modules, prompts: Sequence[str], settings: Any
) -> Encoded:
    """Encodes prompts for one set of settings."""
    encoder = TextEncoder(blueprint, modules)
    roles = blueprint.model.recipe(settings).guider.roles
    texts = [tokenize(blueprint, prompt, settings, roles) for prompt in prompts]
    rows = [{role: encoder(text) for role, text in each.items()} for each in texts]
    dropped = [max((p.dropped for p in t[PROMPT].parts.values()), key=len) for t in texts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return Encoded(stacked, tuple(prompts), tuple(dropped))


class TextEncoder:
    """The text encoders of a model, which encode each text once.

    - `attention`: the backend of each shape of attention so far.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        modules: Modules,
        encode: Callable[..., PyTree] | None = None,
    ):
        """**Arguments:**

        - `encode`: a program in place of `encode_text`.
        """
        self.attention: dict[str, str] = {}
        self._blueprint, self._modules = blueprint, modules
        self._encode = encode or encode_text
        self._known: dict[Any, PyTree] = {}

    def __call__(self, text: Text) -> PyTree:
        """Returns what the encoders say of a text."""
        leaves, structure = jax.tree.flatten(text.tokens)
        key = structure, tuple(np.asarray(leaf).tobytes() for leaf in leaves)
        if key not in self._known:
            encoded, used = self._encode(self._blueprint, self._modules, text.tokens)
            self._known[key] = encoded
            self.attention |= used
        return self._known[key]


@eqx.filter_jit
def encode_text(
    blueprint: Blueprint, modules: Modules, tokens: PyTree
) -> tuple[PyTree, dict[str, str]]:
    """Encodes tokens. Returns what the encoders say and the backend of each attention."""
    with blueprint.computing() as used:
        encoded = blueprint.model.encode(modules, tokens, blueprint.compute_dtype)
    return encoded, used
