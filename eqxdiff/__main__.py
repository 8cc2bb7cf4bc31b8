"""Lets `python -m eqxdiff` be the command `eqxdiff`."""

import importlib
import sys


if __name__ == "__main__":
    sys.exit(importlib.import_module("eqxdiff.cli").main())
