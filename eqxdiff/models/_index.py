from collections.abc import Collection, Mapping
from typing import Any

from .._errors import ConfigError


def read_index(
    fields: Mapping[str, Any],
    *,
    pipelines: Collection[str],
    components: Mapping[str, Collection[str]],
    unused: Collection[str] = (),
    flags: Collection[str] = (),
) -> dict[str, Any]:
    """Checks the classes in `model_index.json` and returns what is left of it: the flags.

    **Arguments:**

    - `pipelines`: the pipeline classes that the family computes.
    - `components`: folder -> the classes that it may be of. Another entry must be null.
    - `unused`: folders of which nothing is read.
    - `flags`: those that are known.

    **Raises:** `ConfigError`, one message that lists every offending entry.
    """
    problems, values = [], {}
    name = fields.get("_class_name")
    if name not in pipelines:
        problems.append(f"_class_name: {name!r} is not {' or '.join(pipelines)}")
    for key, value in fields.items():
        if isinstance(value, list):
            cls = value[1] if len(value) == 2 else None
            if key in components and cls not in components[key]:
                problems.append(f"{key}: {cls!r} is not {' or '.join(components[key])}")
            elif key not in components and key not in unused and cls is not None:
                problems.append(f"{key}: {cls!r} is a component that is not supported")
        elif not key.startswith("_"):
            values[key] = value
            if key not in flags:
                problems.append(f"{key}: an unknown flag")
    problems += [f"{key}: missing" for key in components if key not in fields]
    if problems:
        header = "model_index.json does not describe a pipeline of this family:"
        raise ConfigError("\n  ".join([header, *problems]))
    return values
