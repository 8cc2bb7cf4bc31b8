"""Prompts from options, files and standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from eqxdiff import PromptError, SourceError


def collect_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """Returns the prompts of the options and then the prompts of the file, in order.

    **Raises:** `PromptError` where there are none; `SourceError` where the file cannot be read.
    """
    prompts = [*given, *(() if file is None else read_prompts(file))]
    if not prompts:
        raise PromptError("There is no prompt: give --prompt or --prompt-file.")
    return prompts


def read_prompts(file: str) -> list[str]:
    """Returns the lines of a UTF-8 file that are not blank; `-` is standard input.

    **Raises:** `SourceError`; `PromptError` where the file holds no prompts.
    """
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise SourceError(f"The prompts in {name} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is no UTF-8 text: see byte {error.start}.") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise PromptError(f"There is no prompt in {name}.")
    return prompts
