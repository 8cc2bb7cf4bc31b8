"""Sharding rules of the autoencoder: regular expressions of parameter paths -> logical axes."""

from ..sharding import Rule


AUTOENCODER: tuple[Rule, ...] = (
    (r"(.*[._])?conv(\d|_in|_out|_shortcut)?\.weight", ("embed", None, None, None)),
    (r".*\.to_(q|k|v|out)\.weight", (None, "embed")),
)
