"""The command line: it imports the library, and nothing imports it."""

import sys
from collections.abc import Sequence

from .signals import SIGNALS
from .streams import endure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns its exit status."""
    if argv is not None:
        from .app import run

        return run(argv)
    SIGNALS.serve(as_json="--json" in sys.argv)  # before the imports, which take a second
    endure()
    from .app import run

    return run(sys.argv[1:])
