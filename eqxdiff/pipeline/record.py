"""The text in a PNG file: A1111's `parameters` and an `eqxdiff` JSON object."""

import importlib.metadata
import io
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL.PngImagePlugin import PngInfo

from ..models import GuidedSettings, SampledSettings, applied, declarations
from ..sampling import (
    DDIM,
    SAMPLERS,
    AbstractSolver,
    ClassifierFree,
    StochasticDDIM,
    find_sampler,
)
from .blueprint import Blueprint
from .generate import Picture


SCHEMA = 1
"""The version of the `eqxdiff` object: it changes when the meaning of a field does."""


def versions() -> dict[str, str]:
    """Returns the versions of the packages that compute the picture."""
    return {name: importlib.metadata.version(name) for name in ("eqxdiff", "jax", "jaxlib")}


def run_record(
    blueprint: Blueprint,
    dtypes: Mapping[str, str],
    attention: Mapping[str, str],
    noise: str | None,
    inputs: Mapping[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    """Returns the facts that all pictures of a run have in common.

    **Arguments:**

    - `dtypes`: of the weights of each component, as loaded.
    - `attention`: the backend of each shape of attention that has run.
    - `noise`: the digest of the initial noise of all pictures, where it was given.
    - `inputs`: facts about the input and control pictures, by name.
    """
    seeds = {"source": "seed", "generator": "threefry2x32"}
    return {
        "schema": SCHEMA,
        "model": blueprint.name,
        "weights": blueprint.identity,
        "dtype": dict(dtypes),
        "compute_dtype": str(blueprint.compute_dtype),
        "attention": dict(attention),
        "noise": seeds if noise is None else {"source": "file", "sha256": noise},
        **inputs,
        **({"loras": blueprint.adapters.record()} if blueprint.adapters is not None else {}),
        "batch_size": batch_size,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def chunks(picture: Picture, blueprint: Blueprint, record: Mapping[str, Any]) -> dict[str, str]:
    """Returns the text chunks of a PNG.

    **Arguments:**

    - `record`: from `run_record`.
    """
    own = {
        **record,
        "prompt": picture.prompt,
        "seed": picture.seed,
        "index": picture.index,
        "settings": applied(picture.settings),
    }
    return {
        "parameters": parameters(picture, blueprint),
        "eqxdiff": json.dumps(own, ensure_ascii=False),
    }


def parameters(picture: Picture, blueprint: Blueprint) -> str:
    """Returns the text that A1111 and its kin read.

    The last line is `Key: value` pairs; a value with a comma, colon or newline is a JSON string.
    """
    settings = picture.settings
    recipe = blueprint.model.recipe(settings)
    sampler, spacing = sampler_name(settings, recipe.solver)
    guider = recipe.guider
    pairs: dict[str, Any] = {
        "Steps": settings.steps,
        "Sampler": sampler,
        "Schedule type": spacing,
        "CFG scale": _number(guider.scale) if isinstance(guider, ClassifierFree) else 1,
        "Seed": picture.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": blueprint.name,
    }
    for name, declared in declarations(type(settings)).items():
        value = getattr(settings, name)
        if declared.a1111 is not None and value is not None:
            pairs |= declared.a1111(value)
    pairs["Version"] = f"eqxdiff {versions()['eqxdiff']}"
    last = ", ".join(f"{key}: {quote(value)}" for key, value in pairs.items() if value is not None)
    lines = [picture.prompt]
    if isinstance(settings, GuidedSettings) and settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    return "\n".join([*lines, last])


def _number(scale: jax.Array) -> str:
    """Spells a float32 in as few digits as tell it from others: 3.3, not 3.29999995."""
    return f"{float(str(np.float32(scale))):.9g}"


def quote(value: Any) -> str:
    """Spells a value of the last line, as a JSON string where it would be misread."""
    text = str(value)
    plain = text and text == text.strip() and not any(mark in text for mark in ',:\n"')
    return text if plain else json.dumps(text, ensure_ascii=False)


def sampler_name(settings: Any, solver: AbstractSolver) -> tuple[str, str | None]:
    """Returns A1111's name of the sampler, and the spread of its noise levels where the user chose
    one."""
    kind = None
    if isinstance(settings, SampledSettings):
        kind = settings.schedule
        if settings.sampler is not None:
            sampler = find_sampler(settings.sampler)
            kind = kind or sampler.kind
            return sampler.aliases[-1], None if kind is None else kind.capitalize()
    own = DDIM if isinstance(solver, StochasticDDIM) else type(solver)
    names = [s.aliases[-1] for s in SAMPLERS if own in (type(s.solver), type(s.flow))]
    return (names or [own.__name__])[0], None if kind is None else kind.capitalize()


def png(picture: Picture, texts: Mapping[str, str]) -> bytes:
    """Returns the picture as a PNG file with text chunks."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    picture.image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
