"""Whether the gains of head norms bound the scores of attention."""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.core
import numpy as np

from ..nn import AbstractRotary, RMSNorm


Model = TypeVar("Model")

BOUND = 64.0
"""The largest score that `attention` may be called `bounded` with."""


def bound_scores(model: Model) -> Model:
    """Returns the model with `bounded` set in all attention whose scores cannot leave ±64.

    A head of RMS norm 1 has the length `sqrt(dim)`, times the largest gain at most, and rope keeps
    it. So a scaled score is at most `sqrt(dim)` times the largest gains of queries and of keys.
    Attention whose gains are adapted at run time or are not there yet is not bounded.
    """
    is_rotary = lambda node: isinstance(node, AbstractRotary)

    def change(node: Any) -> Any:
        if not is_rotary(node):
            return node
        bounded = _largest_score(node) <= BOUND
        return node if node.bounded == bounded else dataclasses.replace(node, bounded=bounded)

    return jax.tree.map(change, model, is_leaf=is_rotary)


def _largest_score(node: AbstractRotary) -> float:
    largest, dim = 1.0, 0
    for names in (node.query_norms, node.key_norms):
        norms = [getattr(node, name) for name in names]
        if not all(isinstance(norm, RMSNorm) and _is_there(norm.weight) for norm in norms):
            return math.inf
        largest *= max(float(np.max(np.abs(np.asarray(norm.weight)))) for norm in norms)
        dim = norms[0].weight.shape[-1]
    return math.sqrt(dim) * largest


def _is_there(x: Any) -> bool:
    return isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    )
