"""The kinds of adapters: each computes the change of a weight from its tensors.

The tensors of one adapted weight go by the names of their slots: `down` and `up` of a plain LoRA,
`w1_a` and so on of the others. A kind computes the change (the delta) of the weight row by row,
with the shape that it has in the file's layout, and two factors of low rank where they are smaller.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np


Shape = tuple[int, ...]


Shapes = Mapping[str, Any]
"""Arrays, or tensors of a file that are not read yet: nothing but their `shape` counts."""

Tensors = Mapping[str, np.ndarray]
Rows = Callable[[int, int], np.ndarray]
"""Returns the rows `start:stop` of an array: `rows(start, stop)`."""

Factors = tuple[np.ndarray, np.ndarray]
"""`up` of shape `(out, rank)` and `down` of shape `(rank, everything else)`."""


@dataclasses.dataclass(frozen=True)
class DeltaKind:
    """A kind of adapter.

    **Fields:**

    - `prefix`: the beginning of its slots' names in files.
    - `slots`: the sets of tensors that it may consist of.
    - `rank`: the number by which alpha is divided; `None` where alpha has no effect.
    - `shape`: the delta's shape. Raises `ValueError` where the tensors do not belong together, and
      looks at nothing but their shapes.
    - `delta`: the rows of the delta in float32, for an alpha that equals the rank.
    - `factors`: the delta as a product; `None` where no smaller one exists.
    """

    name: str
    prefix: str
    slots: tuple[frozenset[str], ...]
    rank: Callable[[Shapes], int | None]
    shape: Callable[[Shapes], Shape]
    delta: Callable[[Tensors], Rows]
    factors: Callable[[Tensors], Factors | None]


def find_kind(slots: Collection[str]) -> DeltaKind | None:
    """Returns the kind that consists of tensors in these slots, under their prefix."""
    for kind in KINDS:
        bare = {slot.removeprefix(kind.prefix) for slot in slots}
        if bare in kind.slots and all(slot.startswith(kind.prefix) for slot in slots):
            return kind
    return None


def magnitude_axis(magnitude: Shape, shape: Shape, *, by_rows: bool) -> int:
    """Returns the axis of the weight along which the magnitudes of a DoRA lie: 0 means rows.

    PEFT has one magnitude for each output (`by_rows`), and may write further axes of length 1.
    LyCORIS and kohya write `(1, in)` for each input or `(out, 1)` for each output.

    **Raises:** `ValueError` where the shape is neither.
    """
    size = math.prod(magnitude)
    if by_rows and size == shape[0]:
        return 0
    if not by_rows and magnitude[:2] == (1, size) and shape[1:2] == (size,):
        return 1
    if not by_rows and magnitude[:1] == (size,) == shape[:1]:
        return 0
    raise ValueError(f"magnitudes of {magnitude} for a weight of {shape}")


def decompose(
    weight: np.ndarray, delta: np.ndarray, magnitude: np.ndarray, axis: int
) -> np.ndarray:
    """Returns the factor of each row (axis 0) or column (axis 1) of `weight + delta` in a DoRA.

    The factor makes the norm of the row or column its magnitude.

    Source: https://arxiv.org/abs/2402.09353, equation 5.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    total = weight.astype(np.float32) + delta
    norm = np.sqrt(np.sum(np.square(total, dtype=np.float64), axis=others))
    flat = magnitude.reshape(-1).astype(np.float64)
    return np.where(norm > 0, flat / np.where(norm > 0, norm, 1), 1).astype(np.float32)


def _need(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1)


def _none(t: Shapes) -> None:
    return None


def _cut(array: np.ndarray) -> Rows:
    return lambda start, stop: array[start:stop]


# --- LoRA (https://arxiv.org/abs/2106.09685), and its Tucker form for convolutions ---


def _lora_shape(t: Shapes) -> Shape:
    down, up = t["down"].shape, t["up"].shape
    _need(min(len(down), len(up)) >= 2, f"down of {down} and up of {up}")
    _need(math.prod(up[2:]) == 1, f"up of {up}, which has a kernel of its own")
    if "mid" not in t:
        _need(up[1] == down[0], f"up of {up} and down of {down}, which differ in their rank")
        return (up[0], *down[1:])
    mid = t["mid"].shape
    fits = len(mid) >= 2 and (up[1], down[0]) == mid[:2] and math.prod(down[2:]) == 1
    _need(fits, f"up of {up}, mid of {mid} and down of {down}, which differ in their rank")
    return (up[0], down[1], *mid[2:])


def _lora_factors(t: Tensors) -> Factors:
    down, up = _flat(t["down"]), _flat(t["up"])
    if "mid" in t:
        down = _flat(np.einsum("rs...,si->ri...", t["mid"], down))
    return up, down


def _lora_delta(t: Tensors) -> Rows:
    up, down = _lora_factors(t)
    rest = _lora_shape(t)[1:]
    return lambda start, stop: (up[start:stop] @ down).reshape(-1, *rest)


# --- LoHa (https://arxiv.org/abs/2108.06098): the elementwise product of two LoRAs ---


def _part_shape(t: Shapes, a: str, b: str, core: str) -> Shape:
    """The shape of `a @ b`, or of a Tucker product with a core."""
    one, two = t[a].shape, t[b].shape
    _need(len(one) == len(two) == 2, f"{a} of {one} and {b} of {two}, which are no matrices")
    if core not in t:
        _need(one[1] == two[0], f"{a} of {one} and {b} of {two}, which differ in their rank")
        return (one[0], two[1])
    middle = t[core].shape
    fits = len(middle) >= 2 and middle[:2] == (one[0], two[0])
    _need(fits, f"{a} of {one}, {core} of {middle} and {b} of {two}, which differ in their rank")
    return (one[1], two[1], *middle[2:])


def _part(t: Tensors, a: str, b: str, core: str) -> np.ndarray:
    if core not in t:
        return t[a] @ t[b]
    return np.einsum("ij...,ip,jr->pr...", t[core], t[a], t[b], optimize=True)


def _loha_shape(t: Shapes) -> Shape:
    one, two = _part_shape(t, "w1_a", "w1_b", "t1"), _part_shape(t, "w2_a", "w2_b", "t2")
    _need(one == two, f"factors of {one} and {two}")
    return one


def _loha_delta(t: Tensors) -> Rows:
    if "t1" in t:
        return _cut(_part(t, "w1_a", "w1_b", "t1") * _part(t, "w2_a", "w2_b", "t2"))

    def rows(start: int, stop: int) -> np.ndarray:
        return (t["w1_a"][start:stop] @ t["w1_b"]) * (t["w2_a"][start:stop] @ t["w2_b"])

    return rows


def _loha_factors(t: Tensors) -> Factors | None:
    """The rank is the product of both ranks: each column of one times each column of the other."""
    if "t1" in t:
        return None
    ups, downs = (t["w1_a"], t["w2_a"]), (t["w1_b"], t["w2_b"])
    rank = ups[0].shape[1] * ups[1].shape[1]
    if not _worth(rank, ups[0].shape[0], downs[0].shape[1]):
        return None
    up = np.einsum("or,os->ors", *ups).reshape(-1, rank)
    return up, np.einsum("ri,si->rsi", *downs).reshape(rank, -1)


# --- LoKr (https://arxiv.org/abs/2309.14859): the Kronecker product of two matrices ---


def _lokr_parts(t: Shapes) -> tuple[Shape, Shape]:
    one = t["w1"].shape if "w1" in t else _part_shape(t, "w1_a", "w1_b", "")
    two = t["w2"].shape if "w2" in t else _part_shape(t, "w2_a", "w2_b", "t2")
    _need(len(one) == 2 and len(two) >= 2, f"factors of {one} and {two}")
    return one, two


def _lokr_shape(t: Shapes) -> Shape:
    one, two = _lokr_parts(t)
    return (one[0] * two[0], one[1] * two[1], *two[2:])


def _lokr_rank(t: Shapes) -> int | None:
    """The rank of the second factor, else of the first; `None` where neither is a product."""
    return next((t[slot].shape[0] for slot in ("w2_b", "w1_b") if slot in t), None)


def _lokr_delta(t: Tensors) -> Rows:
    one = t["w1"] if "w1" in t else _part(t, "w1_a", "w1_b", "")
    two = t["w2"] if "w2" in t else _part(t, "w2_a", "w2_b", "t2")
    one = one.reshape(*one.shape, *[1] * (two.ndim - 1))

    def rows(start: int, stop: int) -> np.ndarray:
        i, j = np.divmod(np.arange(start, stop), two.shape[0])
        return (one[i] * two[j][:, None]).reshape(len(i), -1, *two.shape[2:])

    return rows


def _lokr_factors(t: Tensors) -> Factors | None:
    if "w2_a" not in t or "t2" in t:
        return None
    if "w1_a" in t:
        one = t["w1_a"], t["w1_b"]
    elif t["w1"].shape[0] < t["w1"].shape[1]:
        one = np.eye(t["w1"].shape[0], dtype=np.float32), t["w1"]
    else:
        one = t["w1"], np.eye(t["w1"].shape[1], dtype=np.float32)
    two = t["w2_a"], t["w2_b"]
    rank = one[0].shape[1] * two[0].shape[1]
    if not _worth(rank, one[0].shape[0] * two[0].shape[0], one[1].shape[1] * two[1].shape[1]):
        return None
    return np.kron(one[0], two[0]), np.kron(one[1], two[1])


def _worth(rank: int, rows: int, columns: int) -> bool:
    """Whether two factors are smaller than the matrix that they make."""
    return rank * (rows + columns) < rows * columns


_LOHA = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})
_FIRST = ({"w1"}, {"w1_a", "w1_b"})
_SECOND = ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
_LOKR = tuple(frozenset(one | two) for one in _FIRST for two in _SECOND)


def _whole(name: str) -> DeltaKind:
    return DeltaKind(
        name,
        "",
        (frozenset({name}),),
        _none,
        lambda t: t[name].shape,
        lambda t: _cut(t[name]),
        _none,
    )


KINDS = (
    DeltaKind(
        "lora",
        "",
        (frozenset({"down", "up"}), frozenset({"down", "mid", "up"})),
        lambda t: t["down"].shape[0],
        _lora_shape,
        _lora_delta,
        _lora_factors,
    ),
    DeltaKind(
        "loha",
        "hada_",
        (_LOHA, _LOHA | {"t1", "t2"}),
        lambda t: t["w1_b"].shape[0],
        _loha_shape,
        _loha_delta,
        _loha_factors,
    ),
    DeltaKind("lokr", "lokr_", _LOKR, _lokr_rank, _lokr_shape, _lokr_delta, _lokr_factors),
    _whole("diff"),  # a change in full
    _whole("set"),  # the new weight in full
)
