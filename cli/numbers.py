"""Several numbers in one option."""

import re

from eqxdiff import SettingError


def parse_size(option: str, text: str | None) -> tuple[int, int] | None:
    """`WIDTHxHEIGHT` to height and width. **Raises:** `SettingError`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip().lower())
    if match is None:
        raise SettingError(f"{option} {text} is not understood: write WIDTHxHEIGHT.")
    return int(match[2]), int(match[1])


def parse_crop(option: str, text: str | None) -> tuple[int, int] | None:
    """`TOP,LEFT`. **Raises:** `SettingError`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})\s*,\s*(\d{1,6})", text.strip())
    if match is None:
        raise SettingError(f"{option} {text} is not understood: write TOP,LEFT.")
    return int(match[1]), int(match[2])


def parse_floats(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between. **Raises:** `SettingError`."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingError(
            f"{option} {text} is not understood: write numbers with commas between."
        ) from None
