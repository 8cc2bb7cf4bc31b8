"""The kinds of adapters: what each computes from its tensors.

The tensors of one adapted weight go by the names of their slots: `down` and `up` of a plain LoRA,
`w1_a` and so on of the others. A kind gives the delta of the weight, with the shape it has in the
file's layout, and two factors of low rank where they are worth it.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

import numpy as np


Tensors = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
Factors = tuple[np.ndarray, np.ndarray]
"""`up` of shape `(out, rank)` and `down` of shape `(rank, everything else)`."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    **Fields:**

    - `prefix`: what comes before its slots in the file's names.
    - `slots`: the sets of tensors that it may consist of.
    - `rank`: what alpha is divided by; `None` where alpha does not count.
    - `shape`: of the delta. Raises `ValueError` where the tensors do not belong together, and
      looks at nothing but their shapes.
    - `delta`: in float32, for alpha equal to the rank.
    - `factors`: the same as a product; `None` where there is none.
    """

    name: str
    prefix: str
    slots: tuple[frozenset[str], ...]
    rank: Callable[[Tensors], int | None]
    shape: Callable[[Tensors], Shape]
    delta: Callable[[Tensors], np.ndarray]
    factors: Callable[[Tensors], Factors | None]


def find_kind(slots: Collection[str]) -> Kind | None:
    """The kind that consists of tensors in these slots, under their prefix."""
    for kind in KINDS:
        bare = {slot.removeprefix(kind.prefix) for slot in slots}
        if bare in kind.slots and all(slot.startswith(kind.prefix) for slot in slots):
            return kind
    return None


def magnitude_axis(magnitude: Shape, shape: Shape, *, by_rows: bool) -> int:
    """Which axis of the weight the magnitudes of a DoRA lie along: 0 for rows, 1 for columns.

    PEFT has one for each output (`by_rows`), whatever axes of length 1 it writes. LyCORIS and
    kohya write `(1, in)` for each input or `(out, 1)` for each output.

    **Raises:** `ValueError` where they are neither.
    """
    size = math.prod(magnitude)
    if by_rows and size == shape[0]:
        return 0
    if not by_rows and magnitude[:2] == (1, size) and shape[1:2] == (size,):
        return 1
    if not by_rows and magnitude[:1] == (size,) == shape[:1]:
        return 0
    raise ValueError(f"magnitudes of {magnitude} for a weight of {shape}")


def decompose(weight: np.ndarray, delta: np.ndarray, magnitude: np.ndarray, axis: int):
    """What each row (axis 0) or column (axis 1) of `weight + delta` is multiplied by in a DoRA.

    Source: https://arxiv.org/abs/2402.09353, equation 5: the norm of each becomes its magnitude.
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


def _none(t: Tensors) -> None:
    return None


# --- LoRA (https://arxiv.org/abs/2106.09685), and its Tucker form for convolutions ---


def _lora_shape(t: Tensors) -> Shape:
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


def _product(factors: Callable[[Tensors], Factors], shape: Callable[[Tensors], Shape]):
    def delta(t: Tensors) -> np.ndarray:
        up, down = factors(t)
        return (up @ down).reshape(shape(t))

    return delta


# --- LoHa (https://arxiv.org/abs/2108.06098): the elementwise product of two LoRAs ---


def _part_shape(t: Tensors, a: str, b: str, core: str) -> Shape:
    """Of `a @ b`, or of a Tucker product with a core."""
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


def _loha_shape(t: Tensors) -> Shape:
    one, two = _part_shape(t, "w1_a", "w1_b", "t1"), _part_shape(t, "w2_a", "w2_b", "t2")
    _need(one == two, f"factors of {one} and {two}")
    return one


def _loha_delta(t: Tensors) -> np.ndarray:
    return _part(t, "w1_a", "w1_b", "t1") * _part(t, "w2_a", "w2_b", "t2")


def _loha_factors(t: Tensors) -> Factors | None:
    """Its rank is the product of those of the two: each column of one times each of the other."""
    if "t1" in t:
        return None
    ups, downs = (t["w1_a"], t["w2_a"]), (t["w1_b"], t["w2_b"])
    rank = ups[0].shape[1] * ups[1].shape[1]
    if not _worth(rank, ups[0].shape[0], downs[0].shape[1]):
        return None
    up = np.einsum("or,os->ors", *ups).reshape(-1, rank)
    return up, np.einsum("ri,si->rsi", *downs).reshape(rank, -1)


# --- LoKr (https://arxiv.org/abs/2309.14859): the Kronecker product of two matrices ---


def _lokr_parts(t: Tensors) -> tuple[Shape, Shape]:
    one = t["w1"].shape if "w1" in t else _part_shape(t, "w1_a", "w1_b", "")
    two = t["w2"].shape if "w2" in t else _part_shape(t, "w2_a", "w2_b", "t2")
    _need(len(one) == 2 and len(two) >= 2, f"factors of {one} and {two}")
    return one, two


def _lokr_shape(t: Tensors) -> Shape:
    one, two = _lokr_parts(t)
    return (one[0] * two[0], one[1] * two[1], *two[2:])


def _lokr_rank(t: Tensors) -> int | None:
    """Of the second factor, else of the first, else alpha does not count."""
    return next((t[slot].shape[0] for slot in ("w2_b", "w1_b") if slot in t), None)


def _lokr_delta(t: Tensors) -> np.ndarray:
    one = t["w1"] if "w1" in t else _part(t, "w1_a", "w1_b", "")
    two = t["w2"] if "w2" in t else _part(t, "w2_a", "w2_b", "t2")
    return np.kron(one.reshape(*one.shape, *[1] * (two.ndim - 2)), two)


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


def _whole(name: str) -> Kind:
    return Kind(
        name, "", (frozenset({name}),), _none, lambda t: t[name].shape, lambda t: t[name], _none
    )


KINDS = (
    Kind(
        "lora",
        "",
        (frozenset({"down", "up"}), frozenset({"down", "mid", "up"})),
        lambda t: t["down"].shape[0],
        _lora_shape,
        _product(_lora_factors, _lora_shape),
        _lora_factors,
    ),
    Kind(
        "loha",
        "hada_",
        (_LOHA, _LOHA | {"t1", "t2"}),
        lambda t: t["w1_b"].shape[0],
        _loha_shape,
        _loha_delta,
        _loha_factors,
    ),
    Kind("lokr", "lokr_", _LOKR, _lokr_rank, _lokr_shape, _lokr_delta, _lokr_factors),
    _whole("diff"),  # a change in full
    _whole("set"),  # the new weight in full
)
