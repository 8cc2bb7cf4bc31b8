"""Prompts with seeds and settings of their own: lines of JSON, or rows of a table."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from .._errors import EqxdiffError, PromptError, printable
from ..pipeline import Request


MOST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One prompt of many.

    **Fields:**

    - `number`: its line or row, from 1 on.
    - `where`: what errors call it, such as `"prompts.jsonl, line 3"`; empty where no file has it.
    - `seed`: `None` leaves it to the run.
    - `settings`: by name; those of the run hold for the others.
    """

    number: int
    where: str
    prompt: str
    seed: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def request(self, seed: int, given: Mapping[str, Any], **fields: Any) -> Request:
        """Returns the request. `seed` and `given` hold where the line says nothing else."""
        own = {**given, **{k: v for k, v in self.settings.items() if v is not None}}
        seed = seed if self.seed is None else self.seed
        return Request(self.prompt, seed=seed, settings=own, **fields)


def read_lines(text: str, file: str) -> list[PromptLine]:
    """Reads lines of JSON objects: `"prompt"`, perhaps `"seed"`, and any settings of the model.

    Blank lines count but say nothing. **Raises:** `PromptError` that names the file and the line.
    """
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", "it is nested too deeply")
                raise PromptError(f"{where} is no JSON object: {why}.") from None
            lines.append(parse_line(value, number, where))
    return lines


def parse_line(value: Any, number: int, where: str) -> PromptLine:
    """Makes a line of an object or row. **Raises:** `PromptError` that names it."""
    if not isinstance(value, Mapping):
        raise PromptError(f"{where} is no JSON object with a prompt.")
    rest = dict(value)
    prompt, seed = rest.pop("prompt", None), rest.pop("seed", None)
    if not isinstance(prompt, str):
        raise PromptError(f"{where} has no prompt that is a text.")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MOST_SEED):
        shown = printable(repr(seed))[:40]
        raise PromptError(f"{where}: the seed {shown} is no number from 0 to {MOST_SEED}.")
    return PromptLine(number, where, prompt, seed, rest)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the place of a line before the message of an error. **Raises:** `EqxdiffError`."""
    try:
        yield
    except EqxdiffError as error:
        if not where:
            raise
        raise type(error)(f"{where}: {str(error).replace('`', '')}") from None
