"""The rooms of the house import in one direction only."""

import ast
import sys
from pathlib import Path

import pytest

import eqxdiff


PACKAGE = Path(eqxdiff.__file__).parent
REPOSITORY = Path(__file__).parents[1]

# Each room may import the rooms on the lines above its own, and its own files.
ORDER = [
    ("_types", "_errors", "_dtypes", "sharding"),
    ("_config", "control", "pictures"),
    ("nn", "kernels"),
    ("text", "vae", "sampling"),
    ("models",),
    ("checkpoint",),
    ("lora", "passes"),
    ("pipeline",),
    ("training",),
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# What may be imported from outside.
RUN_TIME = {"equinox", "huggingface_hub", "jax", "jaxtyping", "ml_dtypes", "numpy", "optax"}
RUN_TIME |= {"PIL", "cv2", "safetensors", "scipy", "tokenizers", "typer"}


def imports(path: Path):
    """Yields (level, dotted module) for every import in a file, those within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


def absolute(path: Path, level: int, module: str) -> str:
    """The full name of what a file of the package imports."""
    if level == 0:
        return module
    package = ("eqxdiff", *path.relative_to(PACKAGE).parent.parts)
    return ".".join([*package[: len(package) - level + 1], module])


def library_files():
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def test_every_room_has_its_place():
    rooms = {room(path.relative_to(PACKAGE).parts) for path in library_files()}
    assert rooms - {"cli", "weights_map"} <= set(LEVEL)


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = room(path.relative_to(PACKAGE).parts)
    for level, module in imports(path):
        name = absolute(path, level, module).split(".")
        if name[0] != "eqxdiff":
            continue
        assert len(name) > 1, f"{path} imports the top of the package"
        target = name[1]
        if target == own:
            continue
        assert target not in ("cli", "weights_map"), f"{path} imports {target}"
        assert LEVEL[target] < LEVEL[own], f"{own} imports {target}"


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_heavy_is_imported(path):
    for level, module in imports(path):
        top = module.split(".")[0]
        assert level or top in RUN_TIME | sys.stdlib_module_names | {"eqxdiff"}, module


def test_sampling_knows_no_model_and_networks_know_no_sampler():
    for path in (PACKAGE / "models").rglob("*.py"):
        if path.name in (
            "network.py",
            "layers.py",
            "_unet.py",
            "_controlnet.py",
            "conditioning.py",
        ):
            modules = [absolute(path, *found) for found in imports(path)]
            assert not any(module.startswith("eqxdiff.sampling") for module in modules), path


def test_nothing_imports_the_command_line():
    files = [*library_files(), *(REPOSITORY / "benchmarks").rglob("*.py")]
    assert files
    for path in files:
        assert not any("cli" in module.split(".") for _, module in imports(path)), path
