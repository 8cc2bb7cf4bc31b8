"""What a family says of the files in which its models are published."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoint.plan import Shape
from ..checkpoint.table import TableFile


@dataclasses.dataclass(frozen=True)
class Lookalikes:
    """Models whose headers cannot be told apart.

    **Fields:**

    - `summary`: what they are, in words.
    - `models`: their names, the likeliest first; none where they are known and not supported.
    - `layout`: component -> the table and the prefix that it has in the original single file.
    """

    summary: str
    models: tuple[str, ...]
    layout: Mapping[str, tuple[TableFile, str]]


def _recognise_none(kind: TableFile, shapes: Mapping[str, Shape]) -> Lookalikes | None:
    """Recognises nothing."""


@dataclasses.dataclass(frozen=True)
class PublishedFiles:
    """How the files of a family are recognised and read.

    **Fields:**

    - `lookalikes`: the sorts of models in the family.
    - `recognise`: tells the sort from one component: it takes the component's published table and
        the shapes of its tensors by name, without their prefix being known. It returns `None` for
        components of other families and for those that tell nothing.
    - `leftovers`: patterns, as of a table's `drop`, of the tensors that single files hold besides
        the components.
    - `marks`: the name of a tensor without meaning of its own -> what its presence in a single
        file changes in the scheduler's config.
    """

    lookalikes: tuple[Lookalikes, ...] = ()
    recognise: Callable[[TableFile, Mapping[str, Shape]], Lookalikes | None] = _recognise_none
    leftovers: tuple[str, ...] = ()
    marks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def of(self, model: str) -> Lookalikes | None:
        """Returns the sort that a model belongs to; `None` where it has no single-file layout."""
        return next((sort for sort in self.lookalikes if model in sort.models), None)
