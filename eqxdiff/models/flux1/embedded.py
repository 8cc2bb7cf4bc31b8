"""The model that comes in the box: its files are in the package, in the published layout."""

from collections.abc import Mapping
from pathlib import Path

from .._family import Preset
from .settings import FluxSettings


FOLDER = Path(__file__).parent / "emoji"


def presets(folder: Path = FOLDER) -> Mapping[str, Preset]:
    """`flux-emoji`, where its files are there: a package may be built without them."""
    if not (folder / "model_index.json").is_file():
        return {}
    settings = FluxSettings(steps=20, height=64, width=64, cfg=3.0, max_sequence_length=20)
    summary = "FLUX.1 architecture, 9 M, trained from scratch on emoji"
    return {"flux-emoji": Preset(summary, "the package", settings, embedded=str(folder))}
