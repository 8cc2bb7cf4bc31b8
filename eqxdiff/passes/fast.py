"""All passes together, and back."""

from typing import Any, TypeVar

import jax

from ..nn import AbstractRotary
from .bound import bound_scores
from .conv import published_convolutions
from .rope import reorder_rope


Model = TypeVar("Model")


def fast(model: Model, *, donate: bool = False) -> Model:
    """Returns the model in the form that computes fastest, with its adapters at run time.

    The results are the same to rounding. A layer that no pass knows keeps its place and its order.

    **Arguments:**

    - `donate`: free each weight as soon as its new form is there. The given model is then lost.
    """
    return bound_scores(reorder_rope(model, "halves", donate=donate))


def published(model: Model) -> Model:
    """Returns the model with its weights as the checkpoint has them: what `fast` is the inverse of.

    Weights that are in the checkpoint's order are not copied.

    **Raises:** `SettingError` where `lay_convolutions` has transformed kernels.
    """
    return published_convolutions(reorder_rope(model, "pairs"))


def is_fast(model: Any) -> bool:
    """Whether a part of the model is in another form than the checkpoint's."""
    is_rotary = lambda node: isinstance(node, AbstractRotary)
    nodes = jax.tree.leaves(model, is_leaf=is_rotary)
    return any(is_rotary(node) and node.order != "pairs" for node in nodes)
