"""The ways in which published files name the tensors of one kind of component."""

import dataclasses
from collections.abc import Collection

from .table import TableFile


@dataclasses.dataclass(frozen=True)
class Form:
    """One of these ways.

    **Fields:**

    - `table`: its key table: a name in `weights_map/`, or the TOML file itself.
    - `marks`: the name of a tensor that every such component has, after any prefix; or several
        spellings of this name.
    - `absent`: the name of a tensor that such a component must not have.
    """

    table: TableFile
    marks: tuple[str, ...]
    absent: str | None = None

    def prefixes(self, names: Collection[str]) -> list[str]:
        """Returns what precedes the names of each component of this form in a file."""
        found: list[str] = []
        taken: set[str] = set()
        for mark in self.marks:
            for name in names:
                if name in taken or not f".{name}".endswith(f".{mark}"):
                    continue
                taken.update(f"{name.removesuffix(mark)}{other}" for other in self.marks)
                taken.update(name for other in self.marks if mark.endswith(other))
                prefix = name.removesuffix(mark).removesuffix(".")
                if self.absent is None or join(prefix, self.absent) not in names:
                    found.append(prefix)
        return found


def join(prefix: str, name: str) -> str:
    """Returns a name under a prefix; an empty prefix stands for none."""
    return f"{prefix}.{name}" if prefix else name
