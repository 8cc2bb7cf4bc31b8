"""Names of output files from templates, and writing files whole or not at all."""

import contextlib
import os
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from eqxdiff import SettingError
from eqxdiff._files import OutputError, draft_in, exists, explained, write_whole as write_file

from .signals import SIGNALS


DEFAULT_NAME = "{model}-{seed}-{index}.png"
PLACEHOLDERS = ("model", "seed", "index", "prompt")
MOST_PROMPT_CHARACTERS = 40
WIDTH = re.compile(r"0?[1-9]\d?")


def picture_paths(
    template: str, model: str, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Path]:
    """Returns the file of each picture.

    **Arguments:**

    - `template`: a file's name with placeholders, or a folder. `{index:03}` pads a number, and
        `{prompt:20}` cuts a prompt.
    - `prompts`, `seeds`: of each picture.

    **Raises:** `SettingError` where the template is wrong or gives two pictures one name.
    """
    if template.endswith(("/", os.sep)) or os.path.isdir(template):
        template = os.path.join(template, DEFAULT_NAME)
    parts = _parse(template)
    paths = []
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        values = {"model": model, "seed": seed, "index": index, "prompt": prompt}
        paths.append(Path("".join(text + _fill(values, *field) for text, *field in parts)))
    if not template.lower().endswith(".png"):
        raise SettingError(f"--output {template} is no PNG file: let its name end in .png.")
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise SettingError(
            f"--output {template} gives several pictures the name {twice}: put {{index}} into it."
        )
    return paths


def _parse(template: str) -> list[tuple[str, str, str]]:
    """Splits a template into triples of text, placeholder and width."""
    known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        raise SettingError(
            f"--output {template} has a brace without its pair: write {{{{ or }}}} for a real one."
        ) from None
    for _, name, width, conversion in parts:
        if name is not None and (name not in PLACEHOLDERS or conversion is not None):
            raise SettingError(
                f"--output {template} has the unknown placeholder {{{name}}}; there are {known}."
            )
        if width and (name == "model" or not WIDTH.fullmatch(width)):
            raise SettingError(
                f"--output {template} has a width that is not understood: {{{name}:{width}}}; "
                "write {index:03} or {prompt:20}."
            )
    return [(text, name or "", width or "") for text, name, width, _ in parts]


def _fill(values: dict[str, str | int], name: str, width: str) -> str:
    value = values.get(name, "")
    if isinstance(value, int):
        return str(value).zfill(int(width or 0))
    if name != "prompt":
        return value
    plain = re.sub(r"\W+", "-", value).strip("-")
    return plain[: int(width or MOST_PROMPT_CHARACTERS)].strip("-") or "empty"


@contextlib.contextmanager
def reserved(paths: Sequence[Path], *, overwrite: bool) -> Iterator[None]:
    """Makes the folders of files, and checks that the files can be written.

    Where the block fails, the folders that were made are removed again if they are empty.

    **Raises:** `OutputError` where a file exists already or cannot be written.
    """
    made: list[Path] = []

    def remove() -> None:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    with SIGNALS.cleaned(remove):
        for path in paths:
            with explained(path):
                if exists(path) and not overwrite:
                    raise OutputError(
                        f"{path} exists already: give --overwrite, or another name with --output."
                    )
                if path.is_dir():
                    raise OutputError(f"{path} is a folder.")
        for folder in dict.fromkeys(path.parent for path in paths):
            with explained(folder):
                missing = [each for each in (folder, *folder.parents) if not exists(each)]
                made += missing
                folder.mkdir(parents=True, exist_ok=True)
                with SIGNALS.undisturbed():
                    draft = draft_in(folder)
                    draft.touch()
                    draft.unlink()
        yield


def write_whole(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Writes a file that appears when all of it is on disk, or not at all.

    **Raises:** `OutputError` where the file exists already or cannot be written.
    """
    with SIGNALS.undisturbed():
        write_file(path, data, overwrite=overwrite)
        SIGNALS.saved(path)
