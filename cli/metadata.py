"""What a PNG says about itself: A1111's `parameters` text and an `eqxdiff` JSON object."""

import dataclasses
import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL.PngImagePlugin import PngInfo

from eqxdiff.models import Settings
from eqxdiff.pipeline import Blueprint, Picture
from eqxdiff.sampling import DDIM, SAMPLERS, StochasticDDIM, find_sampler


SCHEMA = 1
"""The version of the `eqxdiff` object: it changes when the meaning of a field does."""


def versions() -> dict[str, str]:
    """Of what computes the picture."""
    return {name: importlib.metadata.version(name) for name in ("eqxdiff", "jax", "jaxlib")}


def run_record(
    plan: Blueprint,
    dtypes: Mapping[str, str],
    noise: str | None,
    controls: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> dict[str, Any]:
    """What all pictures of a run have in common.

    **Arguments:**

    - `dtypes`: of the weights of each component, as loaded.
    - `controls`: what is known of the control pictures.
    - `noise`: the digest of the initial noise of all pictures, where it was given.
    """
    seeds = {"source": "seed", "generator": "threefry2x32"}
    return {
        "schema": SCHEMA,
        "model": plan.model,
        "weights": plan.identity,
        "dtype": dict(dtypes),
        "compute_dtype": str(plan.compute_dtype),
        "noise": seeds if noise is None else {"source": "file", "sha256": noise},
        **({"controls": list(controls)} if controls else {}),
        **({"loras": plan.adapters.record()} if plan.adapters is not None else {}),
        "batch_size": batch_size,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def texts(
    picture: Picture, index: int, plan: Blueprint, record: Mapping[str, Any]
) -> dict[str, str]:
    """The text chunks of a PNG. `index`: of the picture in its run."""
    own = {
        **record,
        "prompt": picture.prompt,
        "seed": picture.seed,
        "index": index,
        "settings": applied(picture.settings),
    }
    return {
        "parameters": parameters(picture, plan),
        "eqxdiff": json.dumps(own, ensure_ascii=False),
    }


def applied(settings: Settings) -> dict[str, Any]:
    """The settings that are in force."""
    return {
        name: value for name, value in dataclasses.asdict(settings).items() if value is not None
    }


def parameters(picture: Picture, plan: Blueprint) -> str:
    """The text that A1111 and its kin read.

    The last line is `Key: value` pairs; a value with a comma, colon or newline is a JSON string.
    """
    settings = picture.settings
    guidance = plan.family.guidance(plan.configs, settings)
    sampler, spacing = sampler_name(plan, settings)
    embedded, free = guidance.embedded, guidance.classifier_free
    pairs = {
        "Steps": settings.steps,
        "Sampler": sampler,
        "Schedule type": spacing,
        "CFG scale": 1 if free is None else _number(free),
        "Distilled CFG Scale": None if embedded is None else _number(embedded),
        "Seed": picture.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": plan.model,
        "CFG Rescale phi": settings.guidance_rescale,
        "Clip skip": None if settings.clip_skip is None else 1 + settings.clip_skip,
        "Eta": settings.eta,
        "Shift": settings.shift,
        "Prompt 2": settings.prompt_2,
        "Negative prompt 2": settings.negative_prompt_2,
        "Version": f"eqxdiff {versions()['eqxdiff']}",
    }
    last = ", ".join(f"{key}: {quote(value)}" for key, value in pairs.items() if value is not None)
    lines = [picture.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    return "\n".join([*lines, last])


def _number(scale: jax.Array) -> str:
    """A float32 in as few digits as tell it from others: 3.3, not 3.29999995."""
    return f"{float(str(np.float32(scale))):.9g}"


def quote(value: Any) -> str:
    text = str(value)
    plain = text and text == text.strip() and not any(mark in text for mark in ',:\n"')
    return text if plain else json.dumps(text, ensure_ascii=False)


def sampler_name(plan: Blueprint, settings: Settings) -> tuple[str, str | None]:
    """As A1111 calls the sampler, and the spread of its noise levels where the user chose one."""
    kind = settings.schedule
    if settings.sampler is not None:
        sampler = find_sampler(settings.sampler)
        name, kind = sampler.aliases[-1], kind or sampler.kind
    else:
        solver = type(plan.family.solver(plan.configs, settings))
        solver = DDIM if solver is StochasticDDIM else solver
        names = [s.aliases[-1] for s in SAMPLERS if solver in (type(s.solver), type(s.flow))]
        name = (names or [solver.__name__])[0]
    return name, None if kind is None else kind.capitalize()


def png(picture: Picture, chunks: Mapping[str, str]) -> bytes:
    """The picture as a PNG file with text chunks."""
    info = PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    picture.image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
