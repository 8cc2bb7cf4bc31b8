"""Names of a package that are imported when they are first asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Makes the `__getattr__` of a package.

    **Arguments:**

    - `homes`: module of the package -> the names that it gives to the package. The modules
        themselves are names, too. A dot before a module means the package around this one.
    """

    def get(name: str) -> Any:
        for home, names in homes.items():
            if name in names:
                return getattr(importlib.import_module(f".{home}", package), name)
        if name in homes:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
