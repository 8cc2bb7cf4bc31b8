"""Layers in PyTorch's array layouts that act on the trailing axis of one example."""

from .adapted import Adapted as Adapted
from .conv import AbstractConv2d as AbstractConv2d, Conv2d as Conv2d, HWIOConv2d as HWIOConv2d
from .embedding import (
    Embedding as Embedding,
    EmbeddingMLP as EmbeddingMLP,
    silu as silu,
    sinusoid as sinusoid,
)
from .fold import (
    Keep as Keep,
    each as each,
    everything as everything,
    fold as fold,
    nothing as nothing,
    stack as stack,
)
from .linear import (
    AbstractLinear as AbstractLinear,
    Linear as Linear,
    settle as settle,
    side_by_side as side_by_side,
)
from .mlp import (
    MLP as MLP,
    gelu_erf as gelu_erf,
    gelu_tanh as gelu_tanh,
    quick_gelu as quick_gelu,
)
from .norm import (
    GroupNorm as GroupNorm,
    LayerNorm as LayerNorm,
    RMSNorm as RMSNorm,
    layer_norm as layer_norm,
)
from .resnet import (
    Downsample2D as Downsample2D,
    ResnetBlock2D as ResnetBlock2D,
    Upsample2D as Upsample2D,
)
from .rope import (
    AbstractRotary as AbstractRotary,
    Order as Order,
    apply_rope as apply_rope,
    rope as rope,
)
from .winograd import WinogradConv2d as WinogradConv2d
