"""The optimizers that a config can name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon

from .._types import Scalar
from ..checkpoint.load import dotted
from ..models import Component
from ..sharding import logical_axes
from .config import OptimizerConfig


ADAM_RMS = 0.2
"""The usual root mean square of AdamW's updates before the learning rate. Muon's updates are scaled
to it (https://arxiv.org/abs/2502.16982, section 2.2)."""


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: PyTree
) -> optax.GradientTransformation:
    """Makes the optimizer of a run, which clips the gradients.

    **Arguments:**

    - `steps`: the number of steps of the run, at whose end the learning rate has come down.
    - `axes`: `MuonDimensionNumbers` of each parameter that Muon trains, from `matrix_axes`.
    """

    def rate(count: Any) -> Scalar:
        up = jnp.minimum(1.0, (count + 1) / max(1, config.warmup))
        down = jnp.clip((steps - count) / max(1, config.cooldown), 0.0, 1.0)
        return config.learning_rate * up * (down if config.cooldown else 1.0)

    betas = config.beta1, config.beta2
    if config.name == "muon":
        update = muon(
            rate,
            consistent_rms=ADAM_RMS,
            weight_decay=config.weight_decay,
            adam_b1=betas[0],
            adam_b2=betas[1],
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=axes,
        )
    else:
        update = optax.adamw(rate, *betas, weight_decay=config.weight_decay, mask=_matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _matrices(params: PyTree) -> PyTree:
    """Selects the parameters that decay: matrices and kernels, but no biases and norms."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def matrix_axes(
    params: PyTree, components: Mapping[str, Component], adam: Sequence[str] = ()
) -> PyTree:
    """Says for each parameter that Muon trains which of its axes are rows and columns.

    Muon trains matrices and kernels, each layer of stacked blocks by itself.

    **Arguments:**

    - `params`: the trained parameters, by the name of their component.
    - `adam`: regular expressions of the matrices that AdamW trains all the same.
    """

    def axes(entries: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        name, path = dotted(entries[:1]), dotted(entries[1:])
        if any(re.match(pattern, f"{name}.{path}") for pattern in adam):
            return None
        rules = components[name].rules
        stacked = logical_axes(path, leaf.ndim, rules).count("layers") if leaf.ndim > 1 else 0
        own = tuple(range(stacked, leaf.ndim))
        return None if len(own) < 2 else MuonDimensionNumbers(own[1:], own[0])

    return jax.tree_util.tree_map_with_path(axes, params)
