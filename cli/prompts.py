"""Prompts from options, files and standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from eqxdiff import PromptError, SourceError
from eqxdiff.bulk import PromptLine, read_lines


def collect_prompts(given: Sequence[str], file: str | None) -> list[PromptLine]:
    """Returns the prompts of the options and then the prompts of the file, in order.

    **Raises:** `PromptError` where there are none; `SourceError` where the file cannot be read.
    """
    prompts = [PromptLine(number, "", prompt) for number, prompt in enumerate(given, 1)]
    for line in () if file is None else read_prompts(file):
        prompts.append(line)
    if not prompts:
        raise PromptError("There is no prompt: give --prompt or --prompt-file.")
    return prompts


def read_prompts(file: str) -> list[PromptLine]:
    """Returns the lines of a UTF-8 file that are not blank; `-` is standard input.

    The lines of a file whose name ends in .jsonl have seeds and settings of their own.

    **Raises:** `SourceError`; `PromptError` where the file holds no prompts or a line is wrong.
    """
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise SourceError(f"The prompts in {name} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is no UTF-8 text: see byte {error.start}.") from None
    if file.lower().endswith(".jsonl"):
        prompts = read_lines(text, name)
    else:
        numbered = enumerate(text.split("\n"), 1)
        prompts = [PromptLine(number, "", line) for number, line in numbered if line.strip()]
    if not prompts:
        raise PromptError(f"There is no prompt in {name}.")
    return prompts
