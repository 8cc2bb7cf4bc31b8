"""Adapter files as they are: patches of modules, not yet tied to a model."""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError
from ..models import LoraFormat
from ..tensors import AbstractTensorSource, show
from .components import NamedFamily
from .formats import check_names, find_format, split_name
from .kinds import DeltaKind, Shape, Tensors, find_kind
from .strength import Strength


EXTRA = ("alpha", "scale", "up_bias", "diff_b", "dora_scale", "magnitude", "reshape")
"""The slots that may accompany those of a kind."""


class FileTensor:
    """A tensor of an adapter, which stays in its file until it is needed."""

    def __init__(self, source: AbstractTensorSource, name: str, where: str):
        """**Arguments:**

        - `where`: the file's name in errors.

        **Raises:** `CheckpointError` where it holds a value that is not finite.
        """
        self._source, self._name, self._where = source, name, where
        data = self._data()
        self._checksum = zlib.crc32(data.tobytes())
        if not np.isfinite(data.astype(np.float32)).all():
            raise CheckpointError(f"{where}: {show(name)} holds a value that is not finite.")

    @property
    def shape(self) -> Shape:
        return self._source.tensors[self._name].shape

    def _data(self) -> np.ndarray:
        info = self._source.tensors[self._name]
        out = np.empty(info.shape, info.dtype)
        self._source.read(self._name, tuple((0, size) for size in info.shape), out)
        return out

    def read(self) -> np.ndarray:
        """Returns the tensor in float32.

        **Raises:** `CheckpointError` where the file has changed since it was opened.
        """
        data = self._data()
        if zlib.crc32(data.tobytes()) != self._checksum:
            raise CheckpointError(f"{self._where} has changed since it was opened: load it again.")
        return data.astype(np.float32, copy=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Patch:
    """The change that an adapter makes to one module, in the layout of its file.

    **Fields:**

    - `module`: the module's name in the file, with its prefix.
    - `kind`, `tensors`: the change of the weight; `kind` is `None` where only the bias changes.
    - `factor`: the number that multiplies the kind's delta: alpha over rank.
    - `alpha`: alpha as found in the file or its metadata; `None` where it is the rank.
    - `bias`: the change of the bias.
    - `magnitude`, `by_rows`: the magnitudes of a DoRA; by its name they lie along the rows.
    - `reshape`: the shape that the weight must have before the change.
    - `names`: the names of its tensors in the file.
    """

    module: str
    kind: DeltaKind | None
    tensors: Mapping[str, FileTensor]
    factor: float
    alpha: float | None
    bias: np.ndarray | None
    magnitude: np.ndarray | None
    by_rows: bool
    reshape: Shape | None
    names: tuple[str, ...]

    @property
    def shape(self) -> Shape | None:
        """The shape of the weight's delta; `None` where the weight does not change."""
        return None if self.kind is None else self.kind.shape(self.tensors)

    @property
    def rank(self) -> int | None:
        return None if self.kind is None else self.kind.rank(self.tensors)

    @property
    def kind_name(self) -> str:
        """The kind, with DoRA and Tucker forms told apart."""
        if self.kind is None:
            return "bias"
        if self.kind.name in ("diff", "set") and len(next(iter(self.tensors.values())).shape) == 1:
            return "norm"
        tucker = any(slot in self.tensors for slot in ("mid", "t1", "t2"))
        name = f"{self.kind.name}-tucker" if tucker else self.kind.name
        return name if self.magnitude is None else f"dora-{name}".replace("dora-lora", "dora")

    def read(self) -> Tensors:
        """Reads the tensors of the kind, in float32. **Raises:** `CheckpointError`."""
        return {slot: tensor.read() for slot, tensor in self.tensors.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA, or one of its relatives. Its matrices stay in its file until they are needed.

    **Fields:**

    - `name`: its name in errors and reports.
    - `format`: the spelling of its names.
    - `patches`: the changes that it makes to modules.
    - `unread`: name of a tensor -> the reason why it belongs to no patch.
    - `metadata`: the metadata in the file's header.
    - `dtype`: the dtype of its tensors, for the record; patches compute in float32.
    - `strength`: the strength with which it is applied.
    - `sha256`: the hash of the file, in hex; empty for an adapter that is not from a file.
    """

    name: str
    format: LoraFormat
    patches: tuple[Patch, ...]
    unread: Mapping[str, str]
    metadata: Mapping[str, str]
    dtype: np.dtype
    strength: Strength = dataclasses.field(default_factory=Strength)
    sha256: str = ""

    def scaled(self, strength: float | str | Strength) -> "Adapter":
        """Returns the same adapter at another strength, such as `0.8` or `"0.8,NAME.layers.1=0"`.

        **Raises:** `SettingError`.
        """
        return dataclasses.replace(self, strength=Strength.make(strength))


def parse_adapter(
    source: AbstractTensorSource,
    *,
    name: str,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    families: Sequence[NamedFamily] | None = None,
) -> Adapter:
    """Parses the tensors of an adapter.

    **Arguments:**

    - `name`: its name in errors and reports.
    - `metadata`: the metadata of the file, which may hold alpha.
    - `config`: PEFT's `adapter_config.json`, which may hold alpha too.
    - `families`: the families whose formats are recognised; all by default.

    **Raises:** `CheckpointError` where the source is no adapter, or holds a value that is not
    finite.
    """
    form = find_format(source.tensors, families)
    check_names(source.tensors, form, name)
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
        tensors = {slot: FileTensor(source, tensor, name) for slot, tensor in slots.items()}
        try:
            patches.append(_patch(module, tensors, tuple(slots.values()), alphas))
        except ValueError as error:
            unread.update(dict.fromkeys(slots.values(), f"has {error}"))
    return Adapter(name, form, tuple(patches), unread, dict(metadata or {}), source.dtype)


def _refuse(slots: Mapping[str, str], source: AbstractTensorSource) -> str | None:
    """The reason why these slots make no patch, if there is one."""
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


def _patch(
    module: str, slots: dict[str, FileTensor], names: tuple[str, ...], alphas: "Alphas"
) -> Patch:
    """**Raises:** `ValueError` where the tensors do not belong together."""
    own = [slot for slot in slots if slot not in EXTRA]
    kind = find_kind(own) if own else None
    tensors = {slot.removeprefix(kind.prefix): slots[slot] for slot in own} if kind else {}
    extra = {slot: tensor.read() for slot, tensor in slots.items() if slot in EXTRA}
    rank = None
    if kind is not None:
        kind.shape(tensors)
        rank = kind.rank(tensors)
    alpha, factor = alphas.find(module, extra.get("alpha"), rank)
    if "scale" in extra and rank is not None:
        factor = float(extra["scale"].reshape(()))
    biases = [extra[slot].reshape(-1) for slot in ("diff_b", "up_bias") if slot in extra]
    if "up_bias" in extra:
        biases[-1] = biases[-1] * np.float32(factor)
    if len({each.shape for each in biases}) > 1:
        raise ValueError(f"biases of {biases[0].shape} and {biases[1].shape}")
    bias = sum(biases[1:], biases[0]) if biases else None
    magnitude = extra.get("magnitude", extra.get("dora_scale"))
    if magnitude is not None and (kind is None or kind.name in ("diff", "set")):
        raise ValueError("magnitudes of a DoRA without its matrices")
    reshape = None
    if "reshape" in extra:
        reshape = tuple(int(size) for size in extra["reshape"].reshape(-1))
    by_rows = "magnitude" in extra
    return Patch(module, kind, tensors, factor, alpha, bias, magnitude, by_rows, reshape, names)


class Alphas:
    """Finds alpha beside the tensors, in the header of the file, or in PEFT's config."""

    def __init__(
        self, form: LoraFormat, metadata: Mapping[str, str], config: Mapping[str, Any], name: str
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
        """Returns alpha, if there is one, and the number that multiplies the delta."""
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
    """`{"NAME.lora_alpha": 4}` -> `{"NAME": {"lora_alpha": 4}}`."""
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
    """The value of the first pattern that is an ending of a module's path."""
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
