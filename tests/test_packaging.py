"""What is built holds every package and every table, and puts nothing beside itself."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, built from the sdist as an installer would, and the sdist itself."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


PATTERNS = ("*.py", "*.toml", "py.typed", "models/*/README.md", "models/*/*.json")
PATTERNS += ("models/flux1/emoji/**/*.*", "text/example/**/*.*")


def expected() -> set[str]:
    """Each source file and table as it is called once installed."""
    names = set()
    for folder, package in {"eqxdiff": "", "cli": "cli/", "weights_map": "weights_map/"}.items():
        for pattern in PATTERNS:
            for path in (REPOSITORY / folder).rglob(pattern):
                relative = path.relative_to(REPOSITORY / folder).as_posix()
                names.add(f"eqxdiff/{package}{relative}")
    return names


@pytest.mark.slow
def test_the_wheel_is_complete_and_alone(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        scripts = wheel.read(entry).decode()
    assert names == expected()
    assert {name.split("/")[0] for name in names} == {"eqxdiff"}
    assert "eqxdiff = eqxdiff.cli:main" in scripts


@pytest.mark.slow
def test_the_sdist_holds_the_tests(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for name in ("setup.py", "cli/__init__.py", "weights_map/__init__.py", "tests/conftest.py"):
        assert name in names
