"""The family, to which the entry point in the package's metadata leads."""

from collections.abc import Mapping
from functools import partial
from importlib import resources
from typing import Any

from eqxdiff.models import Component, Family, Preset, read_example, read_index
from eqxdiff.sampling import parse_flow_config

from . import files
from .config import PainterConfig, PressConfig, ScribeConfig
from .model import bind
from .network import Painter, Press, Scribe
from .settings import SketchSettings


RULES = (
    (r"letters\.weight", ("vocab", "embed")),
    (r"(image_in|text_in|(time|boldness)_embedder\.linear_[12])\.weight", ("embed", None)),
    (r"blocks\.(to_[qkv]|mlp\.proj_in)\.weight", ("hidden", "embed")),
    (r"blocks\.(to_out|mlp\.proj_out)\.weight", ("embed", "hidden")),
    (r"blocks\.norm_[12]\.weight", (None,)),
    (r"blocks\..*\.bias", (None,)),
    (r"image_out\.weight", (None, "embed")),
    (r"press_(in|out)\.weight", (None, None, None, None)),
)
"""Regular expressions of parameter paths -> logical axes. Vectors need none, but for the axis of
the layers in stacked blocks."""


def parse_index(fields: Mapping[str, Any]) -> None:
    """Reads `model_index.json`. **Raises:** `ConfigError`."""
    read_index(
        fields,
        pipelines=("SketchPipeline",),
        components={
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
            "letters": ("T5TokenizerFast",),
            "scribe": ("Scribe",),
            "painter": ("Painter",),
            "press": ("Press",),
        },
    )


SKETCH = Family(
    name="sketch",
    settings=SketchSettings,
    presets={
        "sketch-small": Preset(
            "A toy that draws nothing yet",
            "nobody/sketch-small",
            SketchSettings(steps=4, height=32, width=32),
        )
    },
    components={
        "scribe": Component(ScribeConfig.parse, Scribe.init, files.SCRIBE, RULES, "text"),
        "painter": Component(PainterConfig.parse, Painter.init, files.PAINTER, RULES, "denoiser"),
        "press": Component(PressConfig.parse, Press.init, files.PRESS, RULES, "vae"),
    },
    tokenizers={"letters": "scribe"},
    parse_index=parse_index,
    parse_scheduler=partial(parse_flow_config, name="scheduler/scheduler_config.json"),
    bind=bind,
    example=partial(read_example, resources.files("sketch") / "example.json"),
    files=files.FILES,
    lora=files.LORA,
)
