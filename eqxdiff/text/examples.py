"""Tokenizers of few tokens, as data, for tiny checkpoints."""

import importlib.resources


def example_tokenizer(kind: str) -> dict[str, str]:
    """Returns the files of a tokenizer by name.

    **Arguments:**

    - `kind`: `"clip"` has bytes, within and at the end of a word; `"t5"` has printable ASCII;
        `"qwen"` has bytes and the marks of a chat.
    """
    folder = importlib.resources.files("eqxdiff.text") / "example" / kind
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
