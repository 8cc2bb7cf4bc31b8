"""The command line."""


def main() -> None:
    """The entry point of the `eqxdiff` command."""
    raise SystemExit("not yet")
