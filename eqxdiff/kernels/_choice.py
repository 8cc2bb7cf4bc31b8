"""Which backend computes attention: decided once, when a model is opened."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import jax
from jax.sharding import Mesh
from jaxtyping import Array, DTypeLike, Int

from .._errors import SettingError


Backend = Literal["xla", "chunked", "pallas_tpu", "cudnn", "pallas_gpu"]
Attention = Literal[
    "auto",
    "xla",
    "chunked",
    "pallas_tpu",
    "cudnn",
    "pallas_gpu",
    "dot_product",
    "flash",
    "cudnn_flash_te",
]
"""The names of backends; the last three are those of MaxDiffusion. `"flash"` is the fastest kernel
of the platform."""

Blocks = tuple[int, int]
"""How many queries and how many keys a backend works on at a time."""

Segments = tuple[Int[Array, " queries"], Int[Array, " keys"]]
BatchSegments = tuple[Int[Array, "#batch queries"], Int[Array, "#batch keys"]]

_AUTO: Mapping[str, tuple[str, ...]] = {
    "cpu": ("chunked",),
    "gpu": ("cudnn", "pallas_gpu", "chunked"),
    "tpu": ("pallas_tpu", "chunked"),
}
_ALIASES: Mapping[str, str] = {"dot_product": "xla", "cudnn_flash_te": "cudnn"}
_PLATFORMS: Mapping[str, str] = {"pallas_tpu": "tpu", "cudnn": "gpu", "pallas_gpu": "gpu"}
_DEVICES = {"tpu": "a TPU", "gpu": "a GPU"}
_PLAIN_BYTES = 5 * 2**20
"""The scores of one example that are not worth a kernel, nor blocks on a CPU."""


@dataclasses.dataclass(frozen=True)
class AttentionChoice:
    """The backends of attention for one model, over some devices.

    **Fields:**

    - `backends`: in the order of preference: a shape that one refuses goes to the next.
    - `chosen`: whether the user named the first one.
    - `blocks`: the queries and keys of a block; `None` leaves them to the backend.
    - `mesh`: the devices that share the work.
    - `platform`, `device`: `"cpu"`, `"gpu"` or `"tpu"`, and the kind of the device.
    - `interpret`: whether kernels are interpreted, as in tests without their device.
    - `unknown_devices`: whether arrays may be spread over devices in a way that is not known.
    - `used`: the backend of each shape that was traced, such as `{"4608x24x128": "cudnn"}`.
    """

    backends: tuple[str, ...]
    chosen: bool = False
    blocks: Blocks | None = None
    mesh: Mesh | None = None
    platform: str = "cpu"
    device: str = "cpu"
    interpret: bool = False
    unknown_devices: bool = False
    used: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def order(self, q: Array, k: Array) -> tuple[str, ...]:
        """Lists the backends to try for the queries and keys of one example."""
        small = 4 * q.shape[0] * q.shape[1] * k.shape[0] <= _PLAIN_BYTES
        return ("xla",) if small and not self.chosen else self.backends

    def note(self, q: Array, k: Array, name: str) -> None:
        """Notes the backend of a shape."""
        (queries, heads, dim), (keys, key_heads, _) = q.shape, k.shape
        tokens = f"{queries}" if keys == queries else f"{queries}:{keys}"
        shared = f"{heads}" if key_heads == heads else f"{heads}:{key_heads}"
        self.used[f"{tokens}x{shared}x{dim}"] = name


def choose_attention(
    attention: str = "auto",
    blocks: Blocks | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> AttentionChoice:
    """Decides which backends a model may take.

    **Arguments:**

    - `attention`: a name; `"auto"` takes the best of the platform for each shape.
    - `blocks`: the queries and keys of a block, by default the backend's own.
    - `dtype`: of the activations.

    **Raises:** `SettingError` for an unknown name, and where the backend cannot run here.
    """
    if attention not in get_args(Attention):
        known = ", ".join(get_args(Attention))
        raise SettingError(f"`attention` {attention} is unknown: it may be {known}.")
    if blocks is not None and (len(blocks) != 2 or min(blocks) < 1):
        raise SettingError("`attention_blocks` are two numbers above 0: of queries and of keys.")
    first = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = "gpu" if first.platform in ("cuda", "rocm") else first.platform
    auto = _AUTO.get(platform, ("chunked",))
    name = auto[0] if attention == "flash" else _ALIASES.get(attention, attention)
    needed = _PLATFORMS.get(name, platform)
    if platform != needed:
        raise SettingError(
            f"`attention` {attention} needs {_DEVICES[needed]}, and this is a {platform.upper()}: "
            "leave it to auto."
        )
    narrow = dtype is None or jax.numpy.dtype(dtype).itemsize == 2
    if name == "cudnn" and attention != "flash" and not narrow:
        raise SettingError(
            f"`attention` {attention} computes in bfloat16 or float16, not in {dtype}: give "
            "another `compute_dtype`, or leave it to auto."
        )
    order = auto if name == "auto" else (name, *(each for each in auto if each != name))
    return AttentionChoice(order, name != "auto", blocks, mesh, platform, first.device_kind)


def attention_for(platform: str) -> AttentionChoice:
    """Returns the backends for devices of another platform, which programs are compiled for here.

    On GPUs these are the forms in plain XLA: the kernels need the device to be compiled.
    """
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    backends = ("chunked",) if platform == "gpu" else _AUTO.get(platform, ("chunked",))
    return AttentionChoice(backends, platform=platform, device=platform)


_CONTEXT = jax.make_user_context()


def attention_choice() -> AttentionChoice:
    """Returns the choice that is in place, or that of a call outside of any."""
    choice = _CONTEXT.value
    if choice is None:
        several = jax.device_count() > 1
        return dataclasses.replace(choose_attention(), unknown_devices=several)
    return choice


@contextlib.contextmanager
def attending(choice: AttentionChoice | None) -> Iterator[dict[str, str]]:
    """Puts a choice in place for all that is traced within, and yields what it notes meanwhile:
    the backend of each shape.

    The choice is part of the key of what JAX caches. `None` changes nothing.
    """
    if choice is None:
        yield {}
        return
    choice = dataclasses.replace(choice, used={})
    with _CONTEXT(choice):
        yield choice.used
