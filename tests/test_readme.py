"""The README says what is true."""

import re
from pathlib import Path

import pytest

import eqxdiff
from eqxdiff.models import find_model


REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.slow
def test_the_python_in_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(first.splitlines()) <= 12
    names: dict = {}
    for code in (first, *others):
        exec(code, names)
    assert (tmp_path / "apple-again.png").is_file()
    assert (names["edited"].components["transformer"].proj_out.bias == 0).all()


@pytest.mark.parametrize("name", eqxdiff.model_names())
def test_every_model_is_in_the_table(name):
    _, preset = find_model(name)
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    assert preset.repository in row
    assert f"| {preset.defaults.steps} |" in row
    assert f"{preset.defaults.width}x{preset.defaults.height}" in row


def test_ci_runs_its_test_command():
    (command,) = re.findall(r"&& (python -m pytest.*)", README)
    assert command in (REPOSITORY / ".ci" / "run").read_text().splitlines()
