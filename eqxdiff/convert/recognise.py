"""Recognises what a file holds by the names and shapes in its header, never by its own name."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from .._errors import CheckpointError
from ..checkpoint import Table, leaf_paths, read_table
from ..checkpoint.form import Form
from ..checkpoint.listing import condense
from ..checkpoint.plan import Plan, Shape, compile_plan
from ..checkpoint.table import Pattern, TableFile
from ..hub import Part, Weights
from ..models import Component, Lookalikes, PublishedFiles, families
from ..tensors import AbstractTensorSource, Subset, dequantised


def forms() -> dict[TableFile, tuple[Form, ...]]:
    """Returns the forms of each kind of component, which is called by its published table."""
    found: dict[TableFile, tuple[Form, ...]] = {}
    for family in families():
        for component in (*family.components.values(), family.controlnet):
            if component is not None:
                others = found.get(component.table, ())
                found[component.table] = tuple(dict.fromkeys((*others, *component.forms)))
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def denoisers() -> list[str]:
    """Returns the folders in which the families have their denoisers."""
    parts = [part for family in families() for part in family.components.items()]
    return list(dict.fromkeys(name for name, part in parts if part.stage == "denoiser"))


def leftovers() -> Table:
    """Returns a table that drops what single files hold besides their components."""
    patterns = (pattern for family in families() for pattern in family.files.leftovers)
    return Table("leftovers", drop=tuple(map(Pattern.parse, dict.fromkeys(patterns))))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A component in a file.

    **Fields:**

    - `kind`: the table of its published layout.
    - `table`: the table of the layout that it is in.
    - `prefix`: what precedes its names.
    - `names`: its tensors.
    """

    kind: TableFile
    table: TableFile
    prefix: str
    names: tuple[str, ...]

    def key_table(self) -> Table:
        """Returns its table, for this prefix alone."""
        return dataclasses.replace(read_table(self.table), prefix=(self.prefix,))

    def of(self, tensors: AbstractTensorSource) -> AbstractTensorSource:
        """Returns its tensors alone."""
        return Subset(tensors, self.names)


def find_pieces(names: Collection[str]) -> tuple[list[Piece], list[str]]:
    """Finds the components in a file, and the names that belong to none of them."""
    spots = [
        (prefix, kind, form.table)
        for kind, ways in forms().items()
        for form in ways
        for prefix in form.prefixes(names)
    ]
    owners = _owners(names, [prefix for prefix, _, _ in spots])
    pieces = []
    for prefix, kind, table in spots:
        pieces.append(Piece(kind, table, prefix, tuple(owners[prefix])))
    return pieces, owners[None]


def _owners(names: Collection[str], prefixes: Collection[str]) -> dict[str | None, list[str]]:
    """Allots each name to the longest prefix that precedes it; `None`: to no prefix."""
    rest = leftovers()
    owners: dict[str | None, list[str]] = {prefix: [] for prefix in (*prefixes, None)}
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        owner = next((head for head in heads if head in owners), None)
        if owner is None and "" in owners and not rest.drops(name):
            owner = ""
        owners[owner].append(name)
    return owners


def choose(tensors: AbstractTensorSource, kind: TableFile, skeleton: Any) -> Piece | None:
    """Picks the component of a file that is most like a module; `None` where none is of its kind.

    **Arguments:**

    - `kind`: the table of the component's published layout.
    """
    pieces = [piece for piece in find_pieces(tensors.tensors)[0] if piece.kind == kind]
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    return max(pieces, key=lambda piece: _likeness(tensors, piece, skeleton))


def _likeness(tensors: AbstractTensorSource, piece: Piece, skeleton: Any) -> float:
    """Returns the share of the module's tensors that the file has, in their shapes."""
    file = {name: tensors.tensors[name].shape for name in piece.names}
    try:
        shapes = _plan(piece, skeleton, file).shapes
    except ValueError:  # a layout that this module does not have
        return 0.0
    return sum(file.get(name) == shape for name, shape in shapes.items()) / max(len(shapes), 1)


def _plan(piece: Piece, skeleton: Any, file: Mapping[str, Shape]) -> Plan:
    leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(skeleton).items()}
    return compile_plan(piece.key_table(), leaves, file, strict=False)


def locate(
    tensors: AbstractTensorSource, kind: TableFile, skeleton: Any
) -> tuple[AbstractTensorSource, Table]:
    """Finds the tensors of one component in a file of any layout, and the table to load them with.

    Where nothing is recognised, it returns all tensors and the published table: loading then says
    what is missing.
    """
    tensors = dequantised(tensors)
    piece = choose(tensors, kind, skeleton)
    if piece is None:
        return tensors, read_table(kind)
    return piece.of(tensors), piece.key_table()


def claim(
    tensors: AbstractTensorSource, wanted: Mapping[str, tuple[TableFile, Any]], name: str
) -> dict[str, Piece]:
    """Finds the components of a model in a file of a whole model, which may have nothing left over.

    **Arguments:**

    - `wanted`: component -> the table of its published layout, and its skeleton.
    - `name`: what errors call the file.

    **Raises:** `CheckpointError`, one message with every component that does not fit and every
    tensor that belongs to none.
    """
    tensors = dequantised(tensors)
    pieces, rest = find_pieces(tensors.tensors)
    chosen: dict[str, Piece] = {}
    problems = []
    for component, (kind, skeleton) in wanted.items():
        candidates = [piece for piece in pieces if piece.kind == kind]
        rivals = sum(other == kind for other, _ in wanted.values())
        if len(candidates) == rivals == 1:
            best = candidates[0]
        else:
            likeness = {piece: _likeness(tensors, piece, skeleton) for piece in candidates}
            best = max(likeness, key=lambda piece: likeness[piece], default=None)
            if best is None or likeness[best] < 0.5:
                continue
        chosen[component] = best
        try:
            file = {tensor: tensors.tensors[tensor].shape for tensor in best.names}
            leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(skeleton).items()}
            compile_plan(best.key_table(), leaves, file, name=component)
        except CheckpointError as error:
            problems.append(str(error).removesuffix("."))
        except ValueError:
            problems.append(f"{component}: it is in the layout of another model")
    drops = leftovers().drops
    left = [tensor for tensor in rest if not drops(tensor)]
    left += [n for p in pieces if p not in chosen.values() for n in p.names if not drops(n)]
    problems += [f"left over: {line}" for line in condense(left, tensors.tensors)]
    if not chosen:
        problems.append("it has none of the components " + ", ".join(wanted))
    if problems:
        held = describe(tensors)
        looks = "" if held is None else f" It looks like {held.summary}."
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{name} does not fit the model.{looks}\n  {lines}")
    return chosen


def claim_parts(
    weights: Weights, components: Mapping[str, Component], configs: Mapping[str, Any]
) -> dict[str, Part]:
    """Finds the components that a single file of weights has; none where there is no such file.

    **Raises:** `CheckpointError` where it does not fit the model or has something left over.
    """
    if weights.single is None:
        return {}
    wanted = {
        name: (component.table, component.skeleton(configs[name]))
        for name, component in components.items()
    }
    found = claim(weights.single.tensors(), wanted, weights.single.file or "")
    return dict.fromkeys(found, weights.single)


def scheduler_fields(weights: Weights, files: PublishedFiles) -> Mapping[str, Any]:
    """Returns `scheduler_config.json`, changed by the marks that a single file has."""
    fields = weights.source.read_json("scheduler/scheduler_config.json")
    if weights.single is None:
        return fields
    names = weights.single.tensors().tensors
    marked = (change for mark, change in files.marks.items() if mark in names)
    return {**fields, **{key: value for change in marked for key, value in change.items()}}


def describe(tensors: AbstractTensorSource) -> Lookalikes | None:
    """Returns what models a file is of; `None` where no family knows it."""
    for piece in find_pieces(tensors.tensors)[0]:
        shapes = {name: tensors.tensors[name].shape for name in piece.names}
        for family in families():
            if (found := family.files.recognise(piece.kind, shapes)) is not None:
                return found
    return None
