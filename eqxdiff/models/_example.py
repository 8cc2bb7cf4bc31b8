"""Checkpoints as data: `example.json` of tiny ones, and the sizes of real ones."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class PublishedSizes:
    """The sizes of a published checkpoint, of which no file need be at hand.

    **Fields:**

    - `files`: the texts of its configs by path, and of tokenizers that make as many tokens.
    - `dtypes`: component -> the dtype of the published weights.
    """

    files: Mapping[str, str]
    dtypes: Mapping[str, str]


def read_published(folder: Traversable, model: str) -> PublishedSizes:
    """Returns the sizes of a published checkpoint, from the folder of its family.

    `published.json` holds under `"files"` and `"models"` the fields in which the published configs
    differ from `example.json`, and under `"dtypes"` the dtypes of the components.
    """
    fields = json.loads((folder / "published.json").read_text(encoding="utf-8"))
    own = dict(fields["models"].get(model, {}))
    dtypes = {**fields["dtypes"], **own.pop("dtypes", {})}
    files = dict(read_example(folder / "example.json", model))
    for change in (fields["files"], own):
        for path, new in change.items():
            files[path] = json.dumps({**json.loads(files.get(path, "{}")), **new}, indent=2)
    return PublishedSizes(files, dtypes)
