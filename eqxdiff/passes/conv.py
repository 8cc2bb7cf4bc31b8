from typing import Any, TypeVar

import jax

from .._errors import SettingError
from ..nn import AbstractConv2d, Adapted, Conv2d, HWIOConv2d, WinogradConv2d


Tree = TypeVar("Tree")

WINOGRAD_CHANNELS = 64
"""Winograd's algorithm is taken where both sides have at least so many channels: with fewer the
transforms of the tiles cost more than the products save."""


def lay_convolutions(tree: Tree, platform: str | None = None) -> Tree:
    """Returns a module or pipeline with its convolutions in the form that a platform computes best.

    On CPUs these are Winograd's algorithm, with kernels transformed once, for the wide 3x3
    convolutions of stride 1. All other convolutions keep their numbers, in the order HWIO.

    The result is for computing: checkpoints and adapters know the checkpoint's own form, so save,
    train and add adapters before this pass. Convolutions that have adapters stay as they are.

    **Arguments:**

    - `platform`: `"cpu"`, `"gpu"` or `"tpu"`; by default JAX's default backend.
    """
    platform = jax.default_backend() if platform is None else platform

    def lay(node: Any) -> Any:
        if not isinstance(node, Conv2d):
            return node
        return (
            WinogradConv2d.of(node) if platform == "cpu" and _gains(node) else HWIOConv2d.of(node)
        )

    return jax.tree.map(lay, tree, is_leaf=_is_convolution)


def published_convolutions(tree: Tree) -> Tree:
    """Returns a model with its convolutions in the checkpoint's order.

    **Raises:** `SettingError` where kernels are transformed, which cannot be undone exactly.
    """

    def restore(node: Any) -> Any:
        if isinstance(node, WinogradConv2d):
            raise SettingError(
                "The convolutions are transformed for computing: save, train and add adapters "
                "before `lay_convolutions`."
            )
        if not isinstance(node, HWIOConv2d):
            return node
        return Conv2d(node.weight.transpose(3, 2, 0, 1), node.bias, node.stride, node.padding)

    return jax.tree.map(restore, tree, is_leaf=_is_convolution)


def _is_convolution(node: Any) -> bool:
    return isinstance(node, AbstractConv2d | Adapted)


def _gains(conv: Conv2d) -> bool:
    fits = conv.weight.shape[2:] == (3, 3) and conv.stride == 1 and conv.padding == 1
    return fits and min(conv.weight.shape[:2]) >= WINOGRAD_CHANNELS
