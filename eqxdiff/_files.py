"""Writing files whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ._errors import EqxdiffError


class OutputError(EqxdiffError):
    """A file exists already or cannot be written."""


def write_whole(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Writes a file that appears when all of it is on disk, or not at all.

    **Raises:** `OutputError` where the file exists already or cannot be written.
    """
    draft = draft_in(path.parent)
    try:
        with explained(path):
            with open(draft, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                draft.replace(path)
            else:
                _rename_new(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _rename_new(draft: Path, path: Path) -> None:
    try:
        os.link(draft, path)  # unlike a rename it fails where there is a file
    except FileExistsError:
        raise OutputError(f"{path} has come into being meanwhile, and is kept.") from None
    except OSError:  # a file system without links
        if exists(path):
            raise OutputError(f"{path} has come into being meanwhile, and is kept.") from None
        draft.rename(path)


def draft_in(folder: Path) -> Path:
    """Returns the name of a file that is not whole yet."""
    return folder / f".eqxdiff-{secrets.token_hex(4)}.part"


def exists(path: Path) -> bool:
    """Tells whether there is a file, a folder or a link, dangling or not. **Raises:** `OSError`."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Puts the system's errors into words. **Raises:** `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from None
    except ValueError:  # a null character
        raise OutputError(f"{str(path)!r} is no name that a file can have.") from None
