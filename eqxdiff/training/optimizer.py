"""The optimizers that a config can name."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon

from .._types import Scalar
from ..checkpoint.load import dotted
from ..sharding import logical_axes
from .config import OptimizerConfig, TrainConfig
from .studio import Studio


ADAM_RMS = 0.2
"""The usual root mean square of AdamW's updates before the learning rate, to which Muon's are
scaled (https://arxiv.org/abs/2502.16982, section 2.2)."""


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: PyTree
) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps, with clipped gradients.

    **Arguments:**

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
    """What decays: weights that are multiplied with, not biases and norms."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def matrix_axes(studio: Studio, config: TrainConfig) -> PyTree:
    """Which trained parameters Muon takes, and which axes of them are rows and columns.

    Matrices and kernels, each layer of stacked blocks by itself, but for the config's `adam`.
    """

    def axes(entries: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        name, path = dotted(entries[:1]), dotted(entries[1:])
        if any(re.match(pattern, f"{name}.{path}") for pattern in config.optimizer.adam):
            return None
        rules = studio.blueprint.family.components[name].rules
        stacked = logical_axes(path, leaf.ndim, rules).count("layers") if leaf.ndim > 1 else 0
        own = tuple(range(stacked, leaf.ndim))
        return None if len(own) < 2 else MuonDimensionNumbers(own[1:], own[0])

    params = eqx.filter(studio.modules, studio.trained)
    return jax.tree_util.tree_map_with_path(axes, params)
