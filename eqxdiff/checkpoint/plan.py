"""A table applied to a model's shapes: a list of moves that can be run both ways."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from .._errors import CheckpointError
from .cast import cast
from .listing import condense, shorten, starred
from .table import Table, Use


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Move:
    """Some first-axis rows of a tensor that are some first-axis rows of a leaf, or of its layer.

    The tensor's rows `start:stop` have shape `theirs`; reshaped to `between`, transposed by `axes`
    and multiplied by `scale` they are the rows `low:high` of the leaf, with shape `ours`.
    A tensor without axes has no rows: its bounds are 0 and 1.
    """

    tensor: str
    start: int
    stop: int
    leaf: str
    layer: int | None
    low: int
    high: int
    theirs: Shape
    between: Shape
    ours: Shape
    axes: tuple[int, ...] | None = None
    scale: float | None = None

    def to_theirs(self, piece: np.ndarray) -> np.ndarray:
        """Undoes what loading does to these rows."""
        if self.scale is not None:
            scaled = np.empty(piece.shape, piece.dtype)
            cast(piece, scaled, self.tensor, self.scale, undo=True)
            piece = scaled
        if self.axes is not None:
            piece = piece.transpose(np.argsort(self.axes))
        return piece.reshape(self.theirs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the tensors of a file and the leaves of a model make each other.

    - `moves`: leaf name -> the moves that fill it, which cover each element once.
    - `shapes`: tensor name -> the shape that it must have, for each tensor that is used.
    - `fills`: leaf name -> the layers without a tensor (`None`: the whole leaf), each with the
      value that fills it.
    - `copies`: tensor name -> the tensor that it must equal, for a second spelling in one file.
    """

    moves: Mapping[str, tuple[Move, ...]]
    shapes: Mapping[str, Shape]
    fills: Mapping[str, tuple[tuple[int | None, float], ...]]
    copies: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Site:
    """A leaf, or one layer of a stacked leaf."""

    leaf: str
    layer: int | None
    shape: Shape


def compile_plan(
    table: Table,
    leaves: Mapping[str, Shape],
    file: Mapping[str, Shape] | None = None,
    *,
    name: str = "the checkpoint",
    strict: bool = True,
) -> Plan:
    """Applies a table to the shapes of a model's leaves and of a file's tensors.

    **Arguments:**

    - `leaves`: path -> shape of each leaf.
    - `file`: name -> shape of each tensor of the file; `None` for the file that would be written.
    - `name`: what errors call the file.
    - `strict`: `False` for the plan of a file that might not fit.

    **Raises:** `CheckpointError`, one message with everything that is missing, left over or of the
    wrong shape; `ValueError` where the table itself does not cover the model.
    """
    sites = _sites(table, leaves)
    moves: dict[str, list[Move]] = defaultdict(list)
    fills: dict[str, list[tuple[int | None, float]]] = defaultdict(list)
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    shapes: dict[str, Shape] = {}
    spellings: dict[str, str] = {}
    missing = []
    for path, site in sites.items():
        uses = table.uses(path)
        present = [[s for s in use.spellings if file is None or s in file] for use in uses]
        default = table.optional_of(path)
        if default is not None and not any(present):
            fills[site.leaf].append((site.layer, default))
            continue
        for use, found in zip(uses, present, strict=True):
            tensor = found[0] if found else use.spellings[0]
            if not found:
                missing.append(tensor)
            spellings.update((other, tensor) for other in found[1:] if file is not None)
            move, whole = _move(table, sites, path, use, tensor, file)
            moves[site.leaf].append(move)
            rows[tensor].append((move.start, move.stop))
            if shapes.setdefault(tensor, whole) != whole:
                raise ValueError(f"{table.name}.toml: {tensor} is used with different shapes")
    _check_cover(table, sites, moves, fills, rows, shapes)
    copies = {s: tensor for s, tensor in spellings.items() if s not in shapes}
    plan = Plan(
        {leaf: tuple(m) for leaf, m in moves.items()},
        shapes,
        {leaf: tuple(f) for leaf, f in fills.items()},
        copies,
    )
    if file is not None and strict:
        _check_file(table, plan, file, list(dict.fromkeys(missing)), name)
    return plan


def _sites(table: Table, leaves: Mapping[str, Shape]) -> dict[str, _Site]:
    sites = {}
    for leaf, shape in leaves.items():
        at = table.stack_depth_at(leaf)
        if at is None:
            sites[leaf] = _Site(leaf, None, tuple(shape))
            continue
        if not shape:
            raise ValueError(f"{table.name}.toml: {leaf} is a stack without an axis of layers")
        segments = leaf.split(".")
        for layer in range(shape[0]):
            path = ".".join([*segments[:at], str(layer), *segments[at:]])
            sites[path] = _Site(leaf, layer, tuple(shape[1:]))
    return sites


def _rows_of(
    table: Table, path: str, shape: Shape, parts: int, choice: int
) -> tuple[Shape, Shape, Shape]:
    """Returns the shapes of one of `parts` equal parts of a leaf: `(theirs, between, ours)`.

    `choice` says which of the reshapes that a row allows is meant.
    """
    where = f"{table.name}.toml: {path} of shape {shape}"
    if parts > 1 and (not shape or shape[0] % parts):
        raise ValueError(f"{where} has no {parts} equal parts")
    ours = tuple(size // parts if i == 0 else size for i, size in enumerate(shape))
    axes = table.transpose_of(path)
    between: Shape = ours
    if axes is not None:
        if len(axes) != len(ours):
            raise ValueError(f"{where} cannot be transposed by {axes}")
        between = tuple(ours[i] for i in np.argsort(axes))
    reshapes = table.reshapes_of(path)
    theirs: Shape = between
    if reshapes:
        reshape = reshapes[min(choice, len(reshapes) - 1)]
        if any(size == 0 and i >= len(between) for i, size in enumerate(reshape)):
            raise ValueError(f"{where} has too few axes for the reshape {reshape}")
        sizes = [between[i] if size == 0 else size for i, size in enumerate(reshape)]
        known = math.prod(size for size in sizes if size >= 0)
        theirs = tuple(math.prod(between) // max(known, 1) if s < 0 else s for s in sizes)
        if math.prod(theirs) != math.prod(between):
            raise ValueError(f"{where} cannot be reshaped to {reshape}")
    return theirs, between, ours


def _move(
    table: Table,
    sites: Mapping[str, _Site],
    path: str,
    use: Use,
    tensor: str,
    file: Mapping[str, Shape] | None,
) -> tuple[Move, Shape]:
    """Returns a move and the shape of its whole tensor, by the first reshape that fits the file."""
    first = _move_by(table, sites, path, use, tensor, 0)
    if file is not None and tensor in file:
        for choice in range(1, len(table.reshapes_of(path))):
            if first[1] == tuple(file[tensor]):
                break
            other = _move_by(table, sites, path, use, tensor, choice)
            if other[1] == tuple(file[tensor]):
                return other
    return first


def _move_by(
    table: Table, sites: Mapping[str, _Site], path: str, use: Use, tensor: str, choice: int
) -> tuple[Move, Shape]:
    site = sites[path]
    theirs, between, ours = _rows_of(table, path, site.shape, use.parts, choice)

    rows = theirs[0] if theirs else 1
    start = _extent(table, sites, path, tensor, theirs, use.before, choice)
    after = _extent(table, sites, path, tensor, theirs, use.after, choice)
    whole = (start + rows + after, *theirs[1:]) if theirs else ()
    count = ours[0] if ours else 1
    low = use.part * count
    move = Move(
        tensor,
        start,
        start + rows,
        site.leaf,
        site.layer,
        low,
        low + count,
        theirs,
        between,
        ours,
        table.transpose_of(path),
        table.scale_of(path),
    )
    return move, whole


def _extent(
    table: Table,
    sites: Mapping[str, _Site],
    path: str,
    tensor: str,
    theirs: Shape,
    siblings: Iterable[tuple[str, int]],
    choice: int,
) -> int:
    """Counts the rows of a tensor that the siblings of a leaf take."""
    total = 0
    for sibling, parts in siblings:
        if sibling not in sites:
            raise ValueError(f"{table.name}.toml: {tensor} needs the leaf {sibling}")
        shape = _rows_of(table, sibling, sites[sibling].shape, parts, choice)[0]
        if shape[1:] != theirs[1:] or not shape:
            raise ValueError(f"{table.name}.toml: {sibling} and {path} cannot share {tensor}")
        total += shape[0]
    return total


def _check_cover(
    table: Table,
    sites: Mapping[str, _Site],
    moves: Mapping[str, list[Move]],
    fills: Mapping[str, list[tuple[int | None, float]]],
    rows: Mapping[str, list[tuple[int, int]]],
    shapes: Mapping[str, Shape],
) -> None:
    """Checks that each row of each tensor and of each leaf is in one move. Tables see to this."""
    for tensor, spans in rows.items():
        if not _tiles(spans, shapes[tensor]):
            raise ValueError(f"{table.name}.toml: {tensor} is not used exactly once: {spans}")
    filled = {(leaf, layer) for leaf, items in fills.items() for layer, _ in items}
    covered: dict[tuple[str, int | None], list[tuple[int, int]]] = defaultdict(list)
    for leaf, items in moves.items():
        for move in items:
            covered[leaf, move.layer].append((move.low, move.high))
    for path, site in sites.items():
        if (site.leaf, site.layer) in filled:
            continue
        spans = covered[site.leaf, site.layer]
        if not _tiles(spans, site.shape):
            raise ValueError(f"{table.name}.toml: {path} is not set exactly once: {spans}")


def _tiles(spans: Collection[tuple[int, int]], shape: Shape) -> bool:
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            return False
        end = stop
    return end == (shape[0] if shape else 1)


def _check_file(
    table: Table, plan: Plan, file: Mapping[str, Shape], missing: list[str], name: str
) -> None:
    used = set(plan.shapes) | set(plan.copies)
    left = [tensor for tensor in file if tensor not in used and not table.drops(tensor)]
    lines = [f"missing: {line}" for line in condense(missing, plan.shapes)]
    lines += [f"left over: {line}" for line in condense(left, file)]
    wrong: dict[tuple[str, Shape, Shape], list[str]] = defaultdict(list)
    for tensor, original in {**{t: t for t in plan.shapes}, **plan.copies}.items():
        want = plan.shapes[original]
        if tensor in file and (got := tuple(file[tensor])) != want:
            wrong[starred(tensor), got, want].append(tensor)
    mismatches = []
    for (_, got, want), names in wrong.items():
        for line in condense(names, ()):
            mismatches.append(f"wrong shape: {line} is {got}, not {want}")
    lines += shorten(mismatches)
    if lines:
        header = f"{name}: the weights do not fit the model."
        raise CheckpointError("\n  ".join([header, *lines]))
