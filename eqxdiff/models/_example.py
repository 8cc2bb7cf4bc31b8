"""Tiny checkpoints as data: `example.json` in a family's folder, and tokenizers of few tokens."""

import json
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from typing import Any

from ..text.examples import example_tokenizer


def read_example(file: Traversable, model: str) -> Mapping[str, str]:
    """Returns the texts of a tiny checkpoint in the published layout, by path.

    **Arguments:**

    - `file`: a JSON object: `"tokenizers"` maps the folder of a tokenizer to its kind,
        `"files"` the path of a config to its fields, and `"models"` the name of a model to the
        fields that are different for it, by path.
    """
    example = json.loads(file.read_text(encoding="utf-8"))
    texts: dict[str, str] = {}
    fields: dict[str, dict[str, Any]] = {}
    for folder, kind in example["tokenizers"].items():
        for name, text in example_tokenizer(kind).items():
            if name.endswith(".json"):
                fields[f"{folder}/{name}"] = json.loads(text)
            else:
                texts[f"{folder}/{name}"] = text
    for change in (example["files"], example["models"].get(model, {})):
        for path, own in change.items():
            fields[path] = {**fields.get(path, {}), **own}
    return {**{path: json.dumps(own, indent=2) for path, own in fields.items()}, **texts}
