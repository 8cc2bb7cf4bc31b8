"""How strongly an adapter is applied: one number, or numbers for components and blocks."""

import dataclasses
import math
from collections.abc import Collection
from typing import Self

from .._errors import SettingError


@dataclasses.dataclass(frozen=True)
class Strength:
    """A scale for every module: the scale of the last rule that matches it, else the default.

    A rule is a component's name, which may be followed by a dot and the beginning of a path in the
    component: `COMPONENT.blocks.7`. `*` stands for one segment and `**` for any number of segments:
    `COMPONENT.**.attn2`.
    """

    default: float = 1.0
    rules: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `0.8`, or `0.8,COMPONENT=0.4`, or `0.5,COMPONENT.**.attn2=0`.

        **Raises:** `SettingError`.
        """
        default, rules = 1.0, []
        for i, item in enumerate(text.split(",")):
            pattern, equals, number = item.rpartition("=")
            if (not equals and i) or (equals and not pattern):
                raise SettingError(f"{text!r} is no scale: after a comma comes NAME=SCALE.")
            try:
                scale = float(number)
            except ValueError:
                scale = math.nan
            if not math.isfinite(scale):
                raise SettingError(f"{number!r} is no scale, which is a number such as 0.8.")
            if equals:
                rules.append((pattern.strip(), scale))
            else:
                default = scale
        return cls(default, tuple(rules))

    @classmethod
    def make(cls, scale: "float | str | Strength") -> "Strength":
        if isinstance(scale, Strength):
            return scale
        return cls.parse(scale) if isinstance(scale, str) else cls(float(scale))

    def __str__(self) -> str:
        """Returns the text that `parse` reads."""
        rules = (f"{pattern}={scale:g}" for pattern, scale in self.rules)
        return ",".join([f"{self.default:g}", *rules])

    def at(self, path: str) -> float:
        """Returns the scale of a module, whose `path` begins with its component."""
        scale = self.default
        for pattern, value in self.rules:
            if matches(pattern, path):
                scale = value
        return scale

    def check(self, paths: Collection[str], name: str) -> None:
        """**Raises:** `SettingError` where a rule matches no module that the adapter changes."""
        for pattern, _ in self.rules:
            if not any(matches(pattern, path) for path in paths):
                components = ", ".join(sorted({path.split(".")[0] for path in paths}))
                raise SettingError(
                    f"{name} touches nothing called {pattern!r}, only parts of {components}."
                )


def matches(pattern: str, path: str) -> bool:
    """Returns whether a path begins with a match of the pattern."""
    return _matches(pattern.split("."), path.split("."))


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(pattern[1:], path[i:]) for i in range(len(path)))
    return bool(path) and pattern[0] in ("*", path[0]) and _matches(pattern[1:], path[1:])


def split_spec(spec: str) -> tuple[str, Strength]:
    """Splits `style.safetensors@0.8` into the file and its strength, which is 1 by default.

    The text after the last `@` is a strength if it begins with a number or contains a `=`.

    **Raises:** `SettingError`.
    """
    source, at, scale = spec.rpartition("@")
    if not at or not source or not _is_scale(scale):
        return spec, Strength()
    return source, Strength.parse(scale)


def _is_scale(text: str) -> bool:
    first = text.split(",")[0]
    if "=" in first:
        return True
    try:
        float(first)
    except ValueError:
        return False
    return True
