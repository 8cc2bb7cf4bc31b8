"""The rooms of the house import in one direction only, and no two classes share a name."""

import ast
import collections
import sys
from pathlib import Path

import pytest

import eqxdiff


PACKAGE = Path(eqxdiff.__file__).parent
REPOSITORY = Path(__file__).parents[1]

# Each room may import the rooms on the lines above its own, and its own files.
ORDER = [
    (
        *("_types", "_errors", "_dtypes", "_config", "_lazy", "_files", "_watch", "_meeting"),
        *("distributed", "sharding", "control", "pictures"),
    ),
    ("nn", "kernels"),
    ("passes",),
    ("tensors",),
    ("checkpoint",),
    ("hub",),
    ("sampling",),
    ("text", "vae"),
    ("models",),
    ("convert",),
    ("lora",),
    ("pipeline",),
    ("training", "bulk"),
    ("plan",),
    ("cli",),
    ("__main__",),
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
LEAVES = ORDER[0]

# What may be imported from outside.
RUN_TIME = {"equinox", "huggingface_hub", "jax", "jaxtyping", "ml_dtypes", "numpy", "optax"}
RUN_TIME |= {"PIL", "cv2", "safetensors", "scipy", "tokenizers", "typer", "ray", "pyarrow"}


def imports(path: Path):
    """Yields (level, dotted module, names) for every import in a file, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def files_by_name() -> dict[str, Path]:
    """Every file of the package, of `cli` and of `weights_map`, by the name it is imported by."""
    roots = {"eqxdiff": PACKAGE}
    roots |= {f"eqxdiff.{part}": REPOSITORY / part for part in ("cli", "weights_map")}
    found = {}
    for root, folder in roots.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([root, *parts]).removesuffix(".__init__")] = path
    return found


FILES = files_by_name()


def imported(name: str) -> list[str]:
    """The files of the package that a file imports."""
    path, found = FILES[name], []
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for level, module, names in imports(path):
        head = package[: len(package) - level + 1] if level else []
        module = ".".join([*head, *filter(None, [module])])
        files = [f"{module}.{each}" for each in names if f"{module}.{each}" in FILES]
        found += files
        if module in FILES and (not names or len(files) < len(names)):
            found.append(module)
    return found


def room(name: str) -> str:
    return name.split(".")[1]


INNER = [name for name in FILES if name != "eqxdiff"]


def test_every_room_has_its_place():
    assert {room(name) for name in INNER} - {"weights_map"} <= set(LEVEL)
    assert {"eqxdiff.cli.app", "eqxdiff.weights_map", "eqxdiff.models.flux1.network"} <= set(FILES)


@pytest.mark.parametrize("name", INNER)
def test_imports_go_one_way(name):
    own = room(name)
    for target in imported(name):
        if own == "cli" and target == "eqxdiff":
            continue
        assert target != "eqxdiff", f"{name} imports the top of the package"
        if room(target) != own:
            assert room(target) != "weights_map", f"{name} imports {target}"
            assert own != "weights_map", f"{name} imports {target}"
            leaf = own in LEAVES and LEVEL[room(target)] == 0
            assert leaf or LEVEL[room(target)] < LEVEL[own], f"{name} imports {target}"


def test_no_two_files_import_each_other():
    """Nor do more of them in a circle; an import within a function counts like any other."""
    graph = {name: set(imported(name)) - {"eqxdiff"} for name in INNER}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_two_classes_share_a_name():
    places = collections.defaultdict(list)
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    twins = {name: where for name, where in places.items() if len(where) > 1}
    assert not twins


@pytest.mark.parametrize("name", INNER)
def test_nothing_heavy_is_imported(name):
    for level, module, _ in imports(FILES[name]):
        top = module.split(".")[0]
        assert level or top in RUN_TIME | sys.stdlib_module_names | {"eqxdiff"}, module


def test_sampling_knows_no_model_and_networks_know_no_sampler():
    networks = ("network", "layers", "blocks", "controlnet", "conditioning")
    for name in INNER:
        if room(name) == "models" and name.split(".")[-1] in networks:
            assert not any(room(target) == "sampling" for target in imported(name)), name


def test_nothing_imports_the_command_line():
    assert not [
        name for name in INNER if room(name) != "cli" and "cli" in map(room, imported(name))
    ]
    for path in (REPOSITORY / "benchmarks").rglob("*.py"):
        assert not any("cli" in module.split(".") for _, module, _ in imports(path)), path


def test_types_are_checked_in_tests():
    """The hook is in place before anything of the package is imported."""
    from eqxdiff.nn import rope

    with pytest.raises(TypeError, match="positions"):
        rope("three", (2,), theta=1.0)
