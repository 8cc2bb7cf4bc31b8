"""Lists of many tensors in few lines, for errors."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection

from ..tensors.source import show


MOST_LINES = 12
"""So many lines of an error list are shown; the rest is counted."""


def starred(name: str) -> str:
    return ".".join("#" if _is_index(segment) else segment for segment in name.split("."))


def _is_index(segment: str) -> bool:
    return segment.isascii() and segment.isdigit() and len(segment) < 10


def condense(names: Collection[str], universe: Collection[str]) -> list[str]:
    """Lists names in few lines: whole branches of `universe` as `branch.*`, layers as `{0-18}`."""
    total = Counter(branch for name in universe for branch in _branches(name))
    ours = Counter(branch for name in names for branch in _branches(name))
    labels: Counter[str] = Counter()
    for name in names:
        whole = (b for b in _branches(name) if ours[b] == total[b] and ours[b] > 1)
        branch = next(whole, None)
        labels[name if branch is None else f"{branch}.*"] += 1
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[starred(label)].append(label)
    lines = []
    for members in groups.values():
        count = sum(labels[label] for label in members)
        text = show(_merge(members))
        lines.append(text if count == 1 else f"{text} ({count} tensors)")
    return shorten(lines)


def shorten(lines: list[str]) -> list[str]:
    if len(lines) <= MOST_LINES:
        return lines
    return [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} more such lines"]


def _branches(name: str) -> list[str]:
    """Lists the branches of a name: `a` and `a.b` of `a.b.c`."""
    return [name[: match.start()] for match in re.finditer(r"\.", name)]


def _merge(labels: list[str]) -> str:
    """Merges `a.0.b` and `a.1.b` to `a.{0-1}.b`."""
    columns = zip(*(label.split(".") for label in labels), strict=True)
    merged = []
    for column in columns:
        distinct = set(column)
        if len(distinct) == 1:
            merged.append(column[0])
        else:
            merged.append("{" + _ranges(sorted(int(segment) for segment in distinct)) + "}")
    return ".".join(merged)


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
