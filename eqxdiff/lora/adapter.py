"""Adapter files as they are: patches of modules, not yet tied to a model."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError
from ..tensors import AbstractTensorSource, show
from .formats import Format, check_names, find_format, split_name
from .kinds import Kind, Shape, Tensors, find_kind
from .strength import Strength


EXTRA = ("alpha", "scale", "up_bias", "diff_b", "dora_scale", "magnitude", "reshape")
"""Slots that come besides those of a kind."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patch:
    """What an adapter does to one module, in the layout of its file.

    **Fields:**

    - `module`: the module's name in the file, with its prefix.
    - `kind`, `tensors`: of the weight's change; `None` where only the bias changes.
    - `factor`: what the kind's delta is multiplied by: alpha over rank.
    - `alpha`: as found in the file or its metadata; `None` where the rank is meant.
    - `bias`: the change of the bias.
    - `magnitude`: of a DoRA, and whether it lies along the rows by its name.
    - `reshape`: the shape that the weight is to have before.
    - `names`: of its tensors in the file.
    """

    module: str
    kind: Kind | None
    tensors: Tensors
    factor: float
    alpha: float | None
    bias: np.ndarray | None
    magnitude: np.ndarray | None
    by_rows: bool
    reshape: Shape | None
    names: tuple[str, ...]

    @property
    def shape(self) -> Shape | None:
        """Of the weight's delta; `None` where the weight does not change."""
        return None if self.kind is None else self.kind.shape(self.tensors)

    @property
    def rank(self) -> int | None:
        return None if self.kind is None else self.kind.rank(self.tensors)

    @property
    def kind_name(self) -> str:
        """With DoRA and Tucker told apart."""
        if self.kind is None:
            return "bias"
        if self.kind.name in ("diff", "set") and len(next(iter(self.tensors.values())).shape) == 1:
            return "norm"
        tucker = any(slot in self.tensors for slot in ("mid", "t1", "t2"))
        name = f"{self.kind.name}-tucker" if tucker else self.kind.name
        return name if self.magnitude is None else f"dora-{name}".replace("dora-lora", "dora")


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA, or one of its relatives, as read from a file.

    **Fields:**

    - `name`: what errors and reports call it.
    - `format`: how its names are spelled.
    - `patches`: what it does to each module.
    - `unread`: name of a tensor -> why it belongs to no patch.
    - `metadata`: of the file's header.
    - `dtype`: of its tensors, for the record; the patches are in float32.
    - `strength`: that it is applied with.
    - `sha256`: of the file, in hex; empty where it is not from one.
    """

    name: str
    format: Format
    patches: tuple[Patch, ...]
    unread: Mapping[str, str]
    metadata: Mapping[str, str]
    dtype: np.dtype
    strength: Strength = dataclasses.field(default_factory=Strength)
    sha256: str = ""

    def scaled(self, strength: float | str | Strength) -> "Adapter":
        """The same adapter at another strength, such as `0.8` or `"unet=0.8,text_encoder=0"`.

        **Raises:** `SettingError`.
        """
        return dataclasses.replace(self, strength=Strength.make(strength))


def parse_adapter(
    source: AbstractTensorSource,
    *,
    name: str,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Reads the tensors of an adapter.

    **Arguments:**

    - `metadata`: of the file, which may hold alpha.
    - `config`: PEFT's `adapter_config.json`, which may hold it too.

    **Raises:** `CheckpointError` where it is none, or has numbers that are not finite.
    """
    check_names(source.tensors, name)
    form = find_format(source.tensors)
    modules: dict[str, dict[str, str]] = {}
    unread: dict[str, str] = {}
    for tensor in source.tensors:
        found = split_name(form, tensor)
        if found is None:
            unread[tensor] = "is no tensor of an adapter"
            continue
        module, slot = found
        other = modules.setdefault(module, {}).setdefault(slot, tensor)
        if other != tensor:
            unread[tensor] = f"means the same as {show(other)}"
    alphas = Alphas(form, metadata or {}, config or {}, name)
    patches = []
    for module, slots in modules.items():
        why = _refuse(slots, source)
        if why is not None:
            unread.update(dict.fromkeys(slots.values(), why))
            continue
        arrays = {slot: _read(source, tensor, name) for slot, tensor in slots.items()}
        try:
            patches.append(_patch(module, arrays, tuple(slots.values()), alphas))
        except ValueError as error:
            unread.update(dict.fromkeys(slots.values(), f"has {error}"))
    return Adapter(name, form, tuple(patches), unread, dict(metadata or {}), source.dtype)


def _refuse(slots: Mapping[str, str], source: AbstractTensorSource) -> str | None:
    """Why these slots make no patch."""
    own = {slot for slot in slots if slot not in EXTRA}
    if own and find_kind(own) is None:
        return f"is of no known kind ({', '.join(sorted(own))})"
    if not own and "diff_b" not in slots:
        return "belongs to tensors that are missing"
    for tensor in slots.values():
        info = source.tensors[tensor]
        if not jnp.issubdtype(info.dtype, jnp.floating) and slots.get("reshape") != tensor:
            return f"holds {info.dtype} numbers"
        if not math.prod(info.shape):
            return f"is empty, of the shape {info.shape}"
    for slot in ("alpha", "scale"):
        if slot in slots and math.prod(source.tensors[slots[slot]].shape) != 1:
            return f"has an {slot} that is not one number"
    return None


def _read(source: AbstractTensorSource, tensor: str, name: str) -> np.ndarray:
    info = source.tensors[tensor]
    out = np.empty(info.shape, info.dtype)
    source.read(tensor, tuple((0, size) for size in info.shape), out)
    wide = out.astype(np.float32)
    if not np.isfinite(wide).all():
        raise CheckpointError(f"{name}: {show(tensor)} holds a value that is not finite.")
    return wide


def _patch(
    module: str, arrays: dict[str, np.ndarray], names: tuple[str, ...], alphas: "Alphas"
) -> Patch:
    """**Raises:** `ValueError` where the tensors do not belong together."""
    own = [slot for slot in arrays if slot not in EXTRA]
    kind = find_kind(own) if own else None
    tensors = {slot.removeprefix(kind.prefix): arrays[slot] for slot in own} if kind else {}
    rank = None
    if kind is not None:
        kind.shape(tensors)
        rank = kind.rank(tensors)
    alpha, factor = alphas.find(module, arrays.get("alpha"), rank)
    if "scale" in arrays and rank is not None:
        factor = float(arrays["scale"].reshape(()))
    biases = [arrays[slot].reshape(-1) for slot in ("diff_b", "up_bias") if slot in arrays]
    if "up_bias" in arrays:
        biases[-1] = biases[-1] * np.float32(factor)
    if len({each.shape for each in biases}) > 1:
        raise ValueError(f"biases of {biases[0].shape} and {biases[1].shape}")
    bias = sum(biases[1:], biases[0]) if biases else None
    magnitude = arrays.get("magnitude", arrays.get("dora_scale"))
    if magnitude is not None and (kind is None or kind.name in ("diff", "set")):
        raise ValueError("magnitudes of a DoRA without its matrices")
    reshape = None
    if "reshape" in arrays:
        reshape = tuple(int(size) for size in arrays["reshape"].reshape(-1))
    by_rows = "magnitude" in arrays
    return Patch(module, kind, tensors, factor, alpha, bias, magnitude, by_rows, reshape, names)


class Alphas:
    """Where alpha stands: beside the tensors, in the header of the file, or in PEFT's config."""

    def __init__(
        self, form: Format, metadata: Mapping[str, str], config: Mapping[str, Any], name: str
    ):
        self._configs: dict[str, Mapping[str, Any]] = {"": config} if config else {}
        text = metadata.get("lora_adapter_metadata")
        if text is not None:
            self._configs |= _by_component(_json(text, name))
        self._network = None
        if form.name == "kohya" and "ss_network_alpha" in metadata:
            self._network = _number(metadata["ss_network_alpha"])

    def find(
        self, module: str, own: np.ndarray | None, rank: int | None
    ) -> tuple[float | None, float]:
        """Alpha, if any, and what the delta is multiplied by."""
        if rank is None:
            return None, 1.0
        if own is not None:
            alpha = float(own.reshape(()))
            return alpha, alpha / rank
        for component, config in self._configs.items():
            if component and not module.startswith(f"{component}."):
                continue
            path = module.removeprefix(f"{component}.").removeprefix("base_model.model.")
            alpha = _pattern(config.get("alpha_pattern"), path)
            alpha = _number(config.get("lora_alpha")) if alpha is None else alpha
            if alpha is not None:
                root = config.get("use_rslora") is True
                return alpha, alpha / (math.sqrt(rank) if root else rank)
        if self._network is not None:
            return self._network, self._network / rank
        return None, 1.0


def _by_component(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"transformer.lora_alpha": 4}` -> `{"transformer": {"lora_alpha": 4}}`."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, _, field = key.rpartition(".")
        configs.setdefault(component, {})[field] = value
    return configs


def _json(text: str, name: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{name}: its lora_adapter_metadata is not a JSON object.")
    return fields


def _pattern(patterns: Any, path: str) -> float | None:
    """The value for the end of a module's path that is named."""
    for ending, value in patterns.items() if isinstance(patterns, dict) else ():
        ending = ending.removeprefix("^").removesuffix("$")
        if path == ending or path.endswith(f".{ending}"):
            return _number(value)
    return None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
