"""The sizes of the components, as their `config.json` files give them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from eqxdiff.models import parse_config


@dataclasses.dataclass(frozen=True)
class ScribeConfig:
    """The sizes of the text encoder. The loader compares `vocab_size` with the tokenizer."""

    vocab_size: int
    dim: int = 32
    heads: int = 2
    layers: int = 2

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads `scribe/config.json`. **Raises:** `ConfigError`."""
        return parse_config(cls, fields, name="scribe/config.json")


@dataclasses.dataclass(frozen=True)
class PainterConfig:
    """The sizes of the denoiser."""

    channels: int = 4
    text_dim: int = 32
    dim: int = 32
    heads: int = 2
    layers: int = 2

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads `painter/config.json`. **Raises:** `ConfigError`."""
        return parse_config(cls, fields, name="painter/config.json")


@dataclasses.dataclass(frozen=True)
class PressConfig:
    """The sizes of the autoencoder: it makes one latent pixel of `patch` by `patch` pixels."""

    channels: int = 4
    patch: int = 4

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads `press/config.json`. **Raises:** `ConfigError`."""
        return parse_config(cls, fields, name="press/config.json")
