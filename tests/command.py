"""The program, run within the tests' own process."""

import dataclasses
import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eqxdiff.convert.example import write_example


SMALL = ("--width", "64", "--height", "64", "--steps", "2")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def files(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.err.splitlines()]

    @property
    def error(self) -> str:
        """The one sentence of a run that failed. Nothing else may have been printed."""
        assert self.status != 0
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert "Traceback" not in self.err
        return self.err.removeprefix("error: ").rstrip("\n")


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path_factory) -> Cli:
    """Runs a command line: `cli("generate", "flux-dev", ...)`."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (script,) = entry_points(group="console_scripts", name="eqxdiff")
    main = script.load()

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def dev(tmp_path_factory) -> Path:
    """A tiny checkpoint of FLUX.1 dev. Not to be changed: copy it."""
    return write_example("flux-dev", tmp_path_factory.mktemp("checkpoints") / "dev")


@pytest.fixture(scope="session")
def schnell(tmp_path_factory) -> Path:
    """A tiny checkpoint of FLUX.1 schnell."""
    return write_example("flux-schnell", tmp_path_factory.mktemp("checkpoints") / "schnell")


@pytest.fixture
def generate(cli, dev, tmp_path, monkeypatch) -> Cli:
    """Runs `eqxdiff generate flux-dev` on the tiny checkpoint in an empty folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*argv: object) -> Outcome:
        return cli("generate", "flux-dev", "--weights", dev, *SMALL, *argv)

    return run


def pixels(path: Path | str) -> np.ndarray:
    """The picture in a file, as int32, so that differences are what they seem."""
    with Image.open(path) as image:
        return np.asarray(image, np.int32)
