"""The programs of a picture, in the order in which they run."""

import dataclasses
from collections.abc import Callable
from typing import Any

from .sample import begin_batch, decode_batch, step_batch
from .texts import encode_text


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs that run the networks. Those that were compiled ahead of time may stand in.

    **Fields:**

    - `encode`: takes and returns the same as `encode_text`.
    - `begin`, `advance`: take and return the same as `begin_batch` and `step_batch`.
    - `decode`: takes and returns the same as `decode_batch`.
    """

    encode: Callable[..., Any] = encode_text
    begin: Callable[..., Any] = begin_batch
    advance: Callable[..., Any] = step_batch
    decode: Callable[..., Any] = decode_batch
