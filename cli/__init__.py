"""The command line: it imports the library, and nothing imports it."""

from .app import main as main
