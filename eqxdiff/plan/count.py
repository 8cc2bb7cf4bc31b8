"""Operations, bytes moved and memory of a program, from its jaxpr and the axes of its weights.

The formula of the memory, wherever no compiler is asked:

- Elementwise operations, transpositions and slices are fused into their readers. All else, and what
  a product, a convolution or a loop reads, is held from where it is made to its last reader.
- On an accelerator a product or convolution that one elementwise operation reads is fused into it.
- An elementwise result takes the place of an operand of its size that is read no more.
- A loop holds its carries twice, and what one turn of its body needs.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax


Axes = tuple[str | None, ...]

LOOPS = {"scan", "while", "cond", "shard_map", "pallas_call"}
"""The operations with functions that are looked into on their own."""

ON_CHIP = 16 * 2**20
"""Arrays of up to so many bytes are taken to stay in the caches of the chip."""

ALIASES = {"reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "sharding_constraint"}
ALIASES |= {"optimization_barrier", "random_wrap", "random_unwrap"}

HEAVY = {"dot_general", "conv_general_dilated", "ragged_dot_general", "sort", "gather", "scatter"}
HEAVY |= {"scatter-add", "scatter_add", "dynamic_update_slice", "cumsum", "pallas_call"}
HEAVY |= {"scan", "while", "cond", "shard_map", "random_bits", "threefry2x32", "custom_call"}
HEAVY |= {"tpu_custom_call", "ffi_call", "top_k", "rng_bit_generator"}

COLLECTIVES = {"psum", "all_gather", "all_to_all", "ppermute", "psum_scatter", "reduce_scatter"}
COLLECTIVES |= {"psum_invariant", "all_gather_invariant"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program needs, on all devices together where nothing else is said.

    **Fields:**

    - `flops`: dtype of the operands -> operations of products and convolutions; a multiplication
        and an addition are two.
    - `split`: the part of `flops` that the mesh axis `tensor` divides.
    - `traffic`: bytes that results written to the device's memory once and read once move. Arrays
        of up to 16 MiB are taken to stay in its caches. The weights are not among them.
    - `temporary`: bytes held at once besides arguments, results included.
    - `reduced`: bytes of the results that have to be summed over `tensor`.
    - `passed`: bytes that explicit collectives take on one device.
    """

    flops: Mapping[str, float]
    split: float
    traffic: float
    temporary: int
    reduced: float
    passed: float

    @property
    def operations(self) -> float:
        """All operations."""
        return sum(self.flops.values())


class _Line(NamedTuple):
    """An operation after the functions that are called have been written out."""

    name: str
    ins: tuple[Any, ...]
    outs: tuple[Any, ...]
    params: Mapping[str, Any]


class _Name:
    """The value of one variable of a jaxpr in one place that it is called from."""

    def __init__(self, aval: Any):
        self.nbytes = _nbytes(aval)
        self.shape = tuple(getattr(aval, "shape", ()))
        self.dtype = getattr(aval, "dtype", None)


def count(function: Any, *args: Any, axes: Sequence[Axes] = (), on_cpu: bool = False) -> Cost:
    """Counts what a function of shapes needs. It traces the function and computes nothing.

    **Arguments:**

    - `axes`: the logical axes of the first leaves of the arguments, which are the weights.
    - `on_cpu`: whether it is for a CPU, where a loop on_cpu the slice of the weights that a product
        reads, and nothing is fused into a product.
    """
    closed = jax.make_jaxpr(function)(*args)
    env = {var: _Name(var.aval) for var in (*closed.jaxpr.invars, *closed.jaxpr.constvars)}
    known = dict(zip((env[var] for var in closed.jaxpr.invars), axes, strict=False))
    return _walk(closed.jaxpr, env, known, on_cpu)


def _nbytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not hasattr(aval, "shape"):
        return 0
    size = getattr(dtype, "itemsize", 4)
    return math.prod(aval.shape) * size


def _walk(jaxpr: Any, env: dict[Any, _Name], axes: dict[_Name, Axes], on_cpu: bool) -> Cost:
    lines: list[_Line] = []
    outs = _inline(jaxpr, env, lines, on_cpu)
    flops: dict[str, float] = {}
    split = traffic = reduced = passed = 0.0
    inner: dict[int, int] = {}
    for number, line in enumerate(lines):
        cost, length = _line_cost(line, axes, on_cpu)
        if cost is None:
            continue
        for dtype, amount in cost.flops.items():
            flops[dtype] = flops.get(dtype, 0.0) + length * amount
        split, reduced = split + length * cost.split, reduced + length * cost.reduced
        traffic, passed = traffic + length * cost.traffic, passed + length * cost.passed
        inner[number] = cost.temporary
    given = set(env.values())
    temporary, moved = _memory(lines, given, set(outs), inner, on_cpu)
    return Cost(flops, split, traffic + moved, temporary, reduced, passed)


def _inline(jaxpr: Any, env: dict[Any, _Name], lines: list[_Line], on_cpu: bool) -> list[_Name]:
    """Writes out the operations of a jaxpr, and returns its results."""
    platforms: dict[Any, int] = {}

    def read(atom: Any) -> _Name:
        return _Name(atom.aval) if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name == "platform_index":
            choices = [names or () for names in eqn.params["platforms"]]
            own = [i for i, names in enumerate(choices) if on_cpu == ("cpu" in names)]
            platforms[eqn.outvars[0]] = (own or [0])[0]
        chosen = platforms.get(eqn.invars[0]) if name == "cond" and ins[0].shape == () else None
        if name == "convert_element_type" and not hasattr(eqn.invars[0], "val"):
            if eqn.invars[0] in platforms:
                platforms[eqn.outvars[0]] = platforms[eqn.invars[0]]
        called = None if name in LOOPS else _called(eqn)
        if chosen is not None or called is not None:
            sub: Any = called
            if chosen is not None:
                sub, ins = eqn.params["branches"][chosen], ins[1:]
            sub = getattr(sub, "jaxpr", sub)
            inside = dict(zip(sub.invars, ins, strict=True))
            inside |= {var: _Name(var.aval) for var in sub.constvars}
            results = _inline(sub, inside, lines, on_cpu)
            env.update(zip(eqn.outvars, results, strict=True))
            continue
        made = [_Name(var.aval) for var in eqn.outvars]
        env.update(zip(eqn.outvars, made, strict=True))
        lines.append(_Line(eqn.primitive.name, tuple(ins), tuple(made), eqn.params))
    return [read(atom) for atom in jaxpr.outvars]


def _called(eqn: Any) -> Any:
    """Returns the function that an operation such as a call of a jitted function calls."""
    for value in eqn.params.values():
        inside = getattr(value, "jaxpr", value)
        if hasattr(inside, "eqns") and len(inside.invars) == len(eqn.invars):
            return inside
    return None


def _line_cost(line: _Line, axes: dict[_Name, Axes], on_cpu: bool) -> tuple[Cost | None, int]:
    """Returns the cost of one operation, or of one turn of a loop, and the number of turns."""
    name, params = line.name, line.params
    own = next((axes[one] for one in line.ins if one in axes), None)
    if name == "dot_general":
        (contract, _), (batch, _) = params["dimension_numbers"]
        left, right = line.ins
        depth = math.prod(left.shape[i] for i in contract)
        work = 2.0 * depth * math.prod(line.outs[0].shape)
        dims = [
            (one, params["dimension_numbers"][0][side])
            for side, one in enumerate((left, right))
            if one in axes
        ]
        summed = any(axes[one][i] == "hidden" for one, along in dims for i in along)
        divided = not dims or any("hidden" in axes[one] for one, _ in dims)
        return _product(line, left.dtype, work, divided, summed, bool(batch)), 1
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kernel = line.ins[1]
        taps = math.prod(kernel.shape[i] for i in numbers.rhs_spec[1:])
        work = 2.0 * taps * math.prod(line.outs[0].shape)
        logical = axes.get(kernel)
        summed = logical is not None and logical[numbers.rhs_spec[1]] == "hidden"
        divided = logical is None or "hidden" in logical
        return _product(line, kernel.dtype, work, divided, summed, False), 1
    if name == "scan":
        return _loop(line, axes, on_cpu), int(params["length"])
    if name == "while":
        body = params["body_jaxpr"].jaxpr
        ins = line.ins[params["cond_nconsts"] :]
        return _walk(body, dict(zip(body.invars, ins, strict=True)), dict(axes), on_cpu), 1
    if name == "cond":
        costs = [
            _walk(b.jaxpr, dict(zip(b.jaxpr.invars, line.ins[1:], strict=True)), dict(axes), on_cpu)
            for b in params["branches"]
        ]
        return min(costs, key=lambda cost: cost.temporary), 1
    if name == "shard_map":
        body = params["jaxpr"]
        body = getattr(body, "jaxpr", body)
        ways = math.prod(params["mesh"].shape.values())
        cost = _walk(body, {var: _Name(var.aval) for var in body.invars}, {}, on_cpu)
        flops = {dtype: ways * amount for dtype, amount in cost.flops.items()}
        return dataclasses.replace(cost, flops=flops, split=ways * cost.split), 1
    if name == "pallas_call":
        told = params.get("cost_estimate")
        if told is None or not getattr(told, "flops", 0):
            grid = math.prod(d for d in params["grid_mapping"].grid if isinstance(d, int))
            body = params["jaxpr"]
            cost = _walk(body, {var: _Name(var.aval) for var in body.invars}, {}, False)
            work = grid * cost.operations
        else:
            work = float(told.flops)
        return Cost({str(line.ins[0].dtype): work}, work, 0, 0, 0, 0), 1
    if name in COLLECTIVES:
        return Cost({}, 0, 0, 0, 0, sum(one.nbytes for one in line.ins)), 1
    if own is not None:
        _follow(line, axes)
    return None, 1


def _product(
    line: _Line, dtype: Any, work: float, divided: bool, summed: bool, batched: bool
) -> Cost:
    reduced = float(line.outs[0].nbytes) if summed else 0.0
    return Cost({str(dtype): work}, work if divided else 0.0, 0, 0, reduced, 0)


def _loop(line: _Line, axes: dict[_Name, Axes], on_cpu: bool) -> Cost:
    body = line.params["jaxpr"].jaxpr
    whole = line.params["num_consts"] + line.params["num_carry"]
    env, inside = {}, {}
    for index, (var, given) in enumerate(zip(body.invars, line.ins, strict=True)):
        if index < whole:
            env[var] = given
            if given in axes:
                inside[given] = axes[given]
            continue
        env[var] = _Name(var.aval)
        if given in axes:
            inside[env[var]] = axes[given][1:]
    cost = _walk(body, env, inside, on_cpu)
    if not on_cpu:
        return cost
    slices = [env[var].nbytes for var in body.invars[whole:]]
    return dataclasses.replace(cost, temporary=cost.temporary + max(slices, default=0))


def _follow(line: _Line, axes: dict[_Name, Axes]) -> None:
    """Carries the axes of a weight to what it is turned into."""
    own = axes.get(line.ins[0])
    out = line.outs[0]
    if own is None or len(own) != len(line.ins[0].shape):
        return
    if line.name == "transpose":
        axes[out] = tuple(own[i] for i in line.params["permutation"])
    elif line.name in ("convert_element_type", "copy", "sharding_constraint"):
        axes[out] = own
    elif line.name in ("reshape", "squeeze", "expand_dims"):
        big = [(size, axis) for size, axis in zip(line.ins[0].shape, own, strict=True) if size > 1]
        if [size for size, _ in big] == [size for size in out.shape if size > 1]:
            left = iter(axis for _, axis in big)
            axes[out] = tuple(next(left) if size > 1 else None for size in out.shape)
    elif out.shape == line.ins[0].shape and len(line.ins) == 1:
        axes[out] = own


def _reduces(name: str) -> bool:
    return name.startswith(("reduce_", "arg")) and name != "reduce_precision"


def _memory(
    lines: Sequence[_Line],
    given: set[_Name],
    results: set[_Name],
    inner: Mapping[int, int],
    on_cpu: bool,
) -> tuple[int, float]:
    """Returns the bytes that are held at once besides what is given, and the bytes moved."""
    read_by_heavy = {one for line in lines if line.name in HEAVY for one in line.ins}
    readers: Counter[_Name] = Counter(one for line in lines for one in line.ins)
    fused_away = (
        set()
        if on_cpu
        else {
            out
            for line in lines
            if line.name in ("dot_general", "conv_general_dilated")
            for out in line.outs
            if readers[out] == 1 and out not in read_by_heavy and out not in results
        }
    )
    sources: dict[_Name, frozenset[_Name]] = {one: frozenset((one,)) for one in given}
    steps: list[tuple[int, _Line, frozenset[_Name], list[_Name]]] = []
    last: dict[_Name, int] = {}
    for number, line in enumerate(lines):
        origin = frozenset().union(*(sources.get(one, frozenset()) for one in line.ins))
        heavy = line.name in HEAVY or _reduces(line.name) or line.name in COLLECTIVES
        made = []
        for out in line.outs:
            wanted = out in read_by_heavy or out in results
            if (
                out in fused_away
                or line.name in ALIASES
                or not (heavy or wanted)
                or (not heavy and out.nbytes < 4096)
            ):
                sources[out] = origin
            else:
                sources[out] = frozenset((out,))
                made.append(out)
        if made or heavy:
            for one in origin:
                last[one] = len(steps)
            steps.append((number, line, origin, made))
    ends = frozenset().union(*(sources.get(one, frozenset((one,))) for one in results))
    live = peak = 0
    moved = 0.0
    alive: dict[_Name, int] = {}
    for place, (number, line, origin, made) in enumerate(steps):
        dying = [one for one in origin if last[one] == place and one in alive and one not in ends]
        if line.name not in ("scan", "while", "cond", "shard_map", "transpose"):
            moved += sum(2.0 * one.nbytes for one in made if one.nbytes > ON_CHIP)
        fused = line.name not in HEAVY and not _reduces(line.name)
        for out in made:
            twin = next((one for one in dying if fused and alive[one] == out.nbytes), None)
            if twin is not None:
                dying.remove(twin)
                alive.pop(twin)
                live -= out.nbytes
            alive[out] = out.nbytes
            live += out.nbytes
        peak = max(peak, live + inner.get(number, 0))
        for one in (*dying, *(one for one in made if one not in last and one not in ends)):
            live -= alive.pop(one, 0)
    return int(peak), moved
