"""Names of pictures that say what is in them, so that a run that starts again finds its own."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..models import applied
from ..pipeline import Blueprint, Request


def picture_name(
    blueprint: Blueprint, number: int, request: Request, inputs: Mapping[str, Any] | None = None
) -> str:
    """Returns the name of the file of a picture: its line, and a digest of all that it is made of.

    Where a file of this name exists, the picture is done; where a prompt, a setting or the weights
    have changed since, the name is another.

    **Arguments:**

    - `number`: the line.
    - `inputs`: facts about the input pictures.

    **Raises:** `SettingError` where the settings of the request are wrong.
    """
    facts = {
        "model": blueprint.name,
        "weights": blueprint.identity,
        "loras": None if blueprint.adapters is None else blueprint.adapters.record(),
        "dtype": str(blueprint.dtype),
        "compute_dtype": str(blueprint.compute_dtype),
        "prompt": request.text,
        "seed": request.seed,
        "settings": applied(blueprint.resolve(request.settings)),
        "inputs": dict(inputs or {}),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"{number:06}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.png"
