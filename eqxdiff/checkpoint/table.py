"""Key tables: how the tensor names of a published layout map onto the paths of our leaves.

A table is a TOML file, such as those in `weights_map/`. It lists exceptions only: a leaf whose
dotted path is the name of a tensor in the file needs no row. Its whole vocabulary:

```toml
prefix = ["model.diffusion_model"]   # precedes every name in the file; "" in the list: or nothing
stack = ["transformer_blocks"]       # our `transformer_blocks.x`[7] is `transformer_blocks.7.x`
drop = [".position_ids"]             # tensors of the file that are not used

[rename]      # ours = the file's name, or a list of spellings, of which the first is written
".attn.to_out" = ".attn.to_out.0"
"shared" = ["shared", "encoder.embed_tokens"]

[split]       # the file's tensor = our leaves, one after another along its first axis
"blocks.*.qkv" = ["blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v"]
"final.modulation" = ["norm_out.linear[2/2]", "norm_out.linear[1/2]"]

[concat]      # our leaf = tensors of the file, equally long, one after another along its first axis
"proj_in" = ["proj_gate", "proj_value"]

[transpose]   # ours = transpose(the file's, axes)
"text_projection.weight" = [1, 0]

[reshape]     # ours = the file's shape, where 0 copies our dimension and -1 is what remains
".to_q.weight" = [0, 0, 1, 1]
".to_k.weight" = [[0, 0, 1, 1], [0, 0]]   # or the shapes seen, of which the first is written

[scale]       # ours = the file's times this
"logit_scale" = 0.01

[optional]    # the leaf is filled with this where the file has no such tensor
".to_q.bias" = 0.0
```

A pattern is a run of whole segments of a dotted name. It begins at the start of the name, or with a
leading dot anywhere in it, and what follows the run stays, so that one row serves `.weight` and
`.bias`. `*` stands for one segment, and those of the two sides correspond in order. Rows of
`rename`, `split` and `concat` combine: each rewrites its own run of one name, a segment is
rewritten once, and where two rows want the same segment the first has it (`split` before `concat`
before `rename`). Stacked leaves are matched with their index in place.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any


Segments = tuple[str, ...]

TableFile = str | Traversable
"""A key table: its name in `weights_map/`, or the TOML file itself, wherever it is."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A run of segments, at the start of a name or anywhere in it."""

    segments: Segments
    floating: bool

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        floating = text.startswith(".")
        segments = tuple(text.removeprefix(".").split(".")) if text else ()
        if any(not segment or "**" in segment for segment in segments):
            raise ValueError(f"the pattern {text!r} has an empty segment or a double star")
        return cls(segments, floating)

    @property
    def stars(self) -> int:
        return self.segments.count("*")

    @functools.cached_property
    def literals(self) -> frozenset[str]:
        """The segments that a name must have, a quick test before `find`."""
        return frozenset(self.segments) - {"*"}

    def find(self, name: Segments) -> Iterator[tuple[int, int, Segments]]:
        """Yields `(start, stop, what the stars stand for)` for each place that matches."""
        length = len(self.segments)
        starts = range(len(name) - length + 1) if self.floating else range(min(1, len(name)))
        for start in starts:
            run = name[start : start + length]
            pairs = list(zip(self.segments, run, strict=False))
            if len(run) == length and all(want in ("*", got) for want, got in pairs):
                yield start, start + length, tuple(got for want, got in pairs if want == "*")

    def matches(self, name: str) -> bool:
        return next(self.find(tuple(name.split("."))), None) is not None

    def fill(self, stars: Segments) -> Segments:
        given = iter(stars)
        return tuple(next(given) if segment == "*" else segment for segment in self.segments)


@dataclasses.dataclass(frozen=True)
class Share:
    """One of the leaves that a tensor is split into: part `index` of `count` equal ones."""

    pattern: Pattern
    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        match = re.fullmatch(r"(.+?)(?:\[(\d+)/(\d+)\])?", text)
        if match is None:
            raise ValueError(f"{text!r} is no pattern")
        index, count = int(match[2] or 1), int(match[3] or 1)
        if not 1 <= index <= count:
            raise ValueError(f"{text!r}: there is no part {index} of {count}")
        return cls(Pattern.parse(match[1]), index - 1, count)


@dataclasses.dataclass(frozen=True)
class Use:
    """One way in which a tensor of a file makes a part of a leaf: a row applied to a leaf's name.

    - `spellings`: the names that the tensor may have, best first.
    - `part`, `parts`: which of how many equal parts of the leaf's first axis.
    - `before`, `after`: the leaves, with their part, that lie before and after in the tensor.
    """

    spellings: tuple[str, ...]
    part: int = 0
    parts: int = 1
    before: tuple[tuple[str, int], ...] = ()
    after: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """A parsed key table; the module's docstring is its grammar."""

    name: str
    prefix: tuple[str, ...] = ("",)
    stack: tuple[Pattern, ...] = ()
    drop: tuple[Pattern, ...] = ()
    rename: tuple[tuple[Pattern, tuple[Pattern, ...]], ...] = ()
    split: tuple[tuple[Pattern, tuple[Share, ...]], ...] = ()
    concat: tuple[tuple[Pattern, tuple[Pattern, ...]], ...] = ()
    transpose: tuple[tuple[Pattern, tuple[int, ...]], ...] = ()
    reshape: tuple[tuple[Pattern, tuple[tuple[int, ...], ...]], ...] = ()
    scale: tuple[tuple[Pattern, float], ...] = ()
    optional: tuple[tuple[Pattern, float], ...] = ()

    @classmethod
    def parse(cls, text: str, name: str = "table") -> "Table":
        """Reads the text of a table. **Raises:** `ValueError` where `text` is not a table."""
        try:
            return cls(name, **_parse(tomllib.loads(text)))
        except ValueError as error:
            raise ValueError(f"{name}.toml: {error}") from None

    def stack_depth_at(self, path: str) -> int | None:
        """Counts the segments of a leaf's path before the layer's index; `None`: no stack."""
        segments = tuple(path.split("."))
        for pattern in self.stack:
            if not pattern.literals.issubset(segments):
                continue
            for _, stop, _ in pattern.find(segments):
                return stop
        return None

    def drops(self, tensor: str) -> bool:
        segments = frozenset(tensor.split("."))
        return any(p.literals <= segments and p.matches(tensor) for p in self.drop)

    def uses(self, name: str) -> tuple[Use, ...]:
        """Returns the tensors that make the leaf `name` (a path with the layer's index in it)."""
        segments = tuple(name.split("."))
        for whole, parts in self.split:
            uses = []
            for place, part in enumerate(parts):
                if not part.pattern.literals.issubset(segments):
                    continue
                for start, stop, stars in part.pattern.find(segments):
                    uses.append(self._split_use(segments, whole, parts, place, start, stop, stars))
                    break
            if uses:
                return tuple(uses)
        for ours, pieces in self.concat:
            if not ours.literals.issubset(segments):
                continue
            for start, stop, stars in ours.find(segments):
                spans = [[(start, stop, (piece.fill(stars),))] for piece in pieces]
                return tuple(
                    Use(self._spell(segments, span), part, len(pieces))
                    for part, span in enumerate(spans)
                )
        return (Use(self._spell(segments, [])),)

    def _split_use(
        self,
        name: Segments,
        whole: Pattern,
        parts: Sequence[Share],
        place: int,
        start: int,
        stop: int,
        stars: Segments,
    ) -> Use:
        siblings = tuple(
            (".".join(name[:start] + part.pattern.fill(stars) + name[stop:]), part.count)
            for part in parts
        )
        spellings = self._spell(name, [(start, stop, (whole.fill(stars),))])
        part = parts[place]
        return Use(spellings, part.index, part.count, siblings[:place], siblings[place + 1 :])

    def _spell(
        self, name: Segments, spans: list[tuple[int, int, tuple[Segments, ...]]]
    ) -> tuple[str, ...]:
        """Returns the spellings of a name whose `spans` are already rewritten."""
        spans, present = list(spans), frozenset(name)
        for ours, spellings in self.rename:
            if not ours.literals <= present:
                continue
            for start, stop, stars in ours.find(name):
                if all(stop <= taken[0] or start >= taken[1] for taken in spans):
                    spans.append((start, stop, tuple(theirs.fill(stars) for theirs in spellings)))
                    break
        spans.sort()
        pieces: list[tuple[Segments, ...]] = [
            tuple(tuple(prefix.split(".")) if prefix else () for prefix in self.prefix)
        ]
        end = 0
        for start, stop, spellings in spans:
            pieces += [(name[end:start],), spellings]
            end = stop
        pieces.append((name[end:],))
        choices = itertools.product(*pieces)
        return tuple(dict.fromkeys(".".join(sum(choice, ())) for choice in choices))

    def _modifier(self, rows: Sequence[tuple[Pattern, Any]], name: str) -> Any:
        segments = frozenset(name.split("."))
        found = (v for p, v in rows if p.literals <= segments and p.matches(name))
        return next(found, None)

    def transpose_of(self, name: str) -> tuple[int, ...] | None:
        return self._modifier(self.transpose, name)

    def reshapes_of(self, name: str) -> tuple[tuple[int, ...], ...]:
        return self._modifier(self.reshape, name) or ()

    def scale_of(self, name: str) -> float | None:
        return self._modifier(self.scale, name)

    def optional_of(self, name: str) -> float | None:
        return self._modifier(self.optional, name)


def read_table(table: TableFile) -> Table:
    """Reads `weights_map/{table}.toml`, or the TOML file that is given.

    **Raises:** `ValueError` where there is no such table or it breaks the grammar.
    """
    where = f"weights_map/{table}.toml" if isinstance(table, str) else str(table)
    tables = importlib.resources.files("eqxdiff.weights_map")
    file = tables / f"{table}.toml" if isinstance(table, str) else table
    if not file.is_file():
        raise ValueError(f"there is no table {where}")
    return Table.parse(file.read_text(encoding="utf-8"), table_name(table))


def table_name(table: TableFile) -> str:
    """Returns what a table is called: the name of its file without the ending."""
    return table if isinstance(table, str) else table.name.removesuffix(".toml")


def _parse(rows: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(Table)} - {"name"}
    if unknown := sorted(set(rows) - known):
        raise ValueError(f"{', '.join(unknown)}: unknown, only {', '.join(sorted(known))}")
    for key in known - {"prefix", "stack", "drop"}:
        if not isinstance(rows.get(key, {}), dict):
            raise ValueError(f"{key}: {rows[key]!r} is not a table of rows")
    table: dict[str, Any] = {}
    if "prefix" in rows:
        table["prefix"] = tuple(_strings(rows["prefix"], "prefix"))
    for key in ("stack", "drop"):
        table[key] = tuple(Pattern.parse(text) for text in _strings(rows.get(key, []), key))
    for key in ("rename", "concat"):
        table[key] = tuple(
            _same_shape(Pattern.parse(ours), [Pattern.parse(t) for t in _strings(theirs, ours)])
            for ours, theirs in rows.get(key, {}).items()
        )
    splits = []
    for whole, texts in rows.get("split", {}).items():
        parts = tuple(Share.parse(text) for text in _strings(texts, whole))
        _same_shape(Pattern.parse(whole), [part.pattern for part in parts])
        splits.append((Pattern.parse(whole), parts))
    table["split"] = tuple(splits)
    items = rows.get("transpose", {}).items()
    table["transpose"] = tuple((Pattern.parse(ours), _integers(axes)) for ours, axes in items)
    table["reshape"] = tuple(
        (Pattern.parse(ours), tuple(map(_integers, _nested(shapes))))
        for ours, shapes in rows.get("reshape", {}).items()
    )
    for key in ("scale", "optional"):
        table[key] = tuple((Pattern.parse(o), _number(v)) for o, v in rows.get(key, {}).items())
    for pattern, axes in table["transpose"]:
        if sorted(axes) != list(range(len(axes))):
            raise ValueError(f"{pattern}: {axes} is not an order of axes")
    return table


def _same_shape(one: Pattern, others: Sequence[Pattern]) -> tuple[Pattern, tuple[Pattern, ...]]:
    for other in others:
        same = one.stars == other.stars and (
            one.floating == other.floating or not other.segments or not one.segments
        )
        if not same:
            left, right = ".".join(one.segments), ".".join(other.segments)
            raise ValueError(f"{left} and {right} differ in their stars or their leading dot")
    return one, tuple(others)


def _strings(value: Any, key: str) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{key}: {value!r} is neither a string nor a list of strings")
    return value


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(v) is not int for v in value):
        raise ValueError(f"{value!r} is not a list of integers")
    return tuple(value)


def _nested(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value and isinstance(value[0], list) else [value]


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)
