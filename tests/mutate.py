"""Breaks the package on purpose, one place at a time, to see that a test notices.

The mutations of a room are data, `mutations/NAME.toml`, a line each:

    rooms = ["models/unet", "nn"]                   # where the paths of the searched modules begin

    [programs.unet-sd2]                             # what is broken, and the check that has to fail
    "gelu by tanh" = ["approximate=False", "approximate=True"]                 # name, old and new

A mutation names neither a function nor a file: `old` is the shortest text that occurs exactly once
in all modules of the rooms, so that code may move and be renamed around it. Line breaks and
trailing commas do not count. Where two modules say the same, a third text says how the path of the
right one ends, as in `["/ 2", "/ 3", "heun"]`.

`programs` are mutations of what JAX compiles; `numbers` are mutations of what Python computes
before, for which nothing has to be compiled again.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
import sys
import tomllib
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import pytest

import eqxdiff


PACKAGE = Path(eqxdiff.__file__).parent
BROKEN = jax.make_user_context()
"""Part of the key of everything that JAX caches: what is compiled within it is met by no other
test, and what other tests compiled is not met within it."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change of the package's source, and the check that has to notice the change.

    **Fields:**

    - `name`: what is broken.
    - `check`: which test has to fail, in the words of the file that runs the mutations.
    - `old`, `new`: the text that occurs once in the `rooms`, and its replacement.
    - `rooms`: where the paths of the searched modules begin, relative to the package.
    - `within`: how the path of the module ends, without `.py`.
    - `compiled`: whether JAX compiles the changed code.
    """

    name: str
    check: str
    old: str
    new: str
    rooms: tuple[str, ...]
    within: str = ""
    compiled: bool = True

    def __str__(self) -> str:
        return self.name


def read_mutations(name: str) -> list[Mutation]:
    """Reads the mutations in `mutations/{name}.toml`."""
    tables = tomllib.loads((Path(__file__).parent / f"mutations/{name}.toml").read_text())
    rooms = tuple(tables.pop("rooms"))
    assert set(tables) <= {"numbers", "programs"}, f"{name}.toml has tables of another kind"
    return [
        Mutation(title, check, old, new, rooms, "".join(within), kind == "programs")
        for kind, checks in tables.items()
        for check, changes in checks.items()
        for title, (old, new, *within) in changes.items()
    ]


def find(mutation: Mutation) -> tuple[Path, str, str]:
    """Finds the module that a mutation changes. Returns its path, its source and the broken source.

    **Raises:** `AssertionError` where the text is not there exactly once.
    """
    modules = _modules(mutation.rooms)
    found = [
        (path, source, match)
        for path, source in modules.items()
        if path.with_suffix("").as_posix().endswith(mutation.within)
        for match in re.finditer(_pattern(mutation.old), source)
    ]
    places = [
        f"{path}:{source[: match.start()].count(chr(10)) + 1}" for path, source, match in found
    ]
    assert len(found) == 1, (
        f"{mutation.name}: {mutation.old!r} has to occur once in {', '.join(mutation.rooms)}, and "
        f"occurs {len(found)} times: {', '.join(places) or 'nowhere'}"
    )
    path, source, match = found[0]
    return path, source, source[: match.start()] + mutation.new + source[match.end() :]


@functools.cache
def _modules(rooms: tuple[str, ...]) -> dict[Path, str]:
    """The source of each module whose path begins with one of `rooms`."""
    paths = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    chosen = [path for path in paths if path.as_posix().startswith(rooms)]
    return {path: (PACKAGE / path).read_text() for path in chosen}


def _pattern(text: str) -> str:
    """A regular expression for a text, wherever its lines are broken."""
    words = re.findall(r"\w+|[^\w\s]", text)
    parts = [f",?\\s*{re.escape(word)}" if word in ")]}" else re.escape(word) for word in words]
    edge = r"\b" if text[-1].isalnum() else ""
    return (r"\b" if text[0].isalnum() else "") + r"\s*".join(parts) + edge


@contextlib.contextmanager
def mutated(mutation: Mutation, *, fresh: Iterable[types.ModuleType] = ()) -> Iterator[None]:
    """Puts a mutation in place. Nothing that others compiled or cached is lost or changed.

    **Arguments:**

    - `fresh`: test modules whose `functools.cache`s hold what the broken code makes. They are empty
        within, and as before afterwards.

    **Raises:** `AssertionError` where the mutation does not fit the code any more.
    """
    path, source, broken = find(mutation)
    module = importlib.import_module(".".join(("eqxdiff", *path.with_suffix("").parts)))
    with pytest.MonkeyPatch.context() as patch:
        for owner in fresh:
            for name, value in list(vars(owner).items()):
                if isinstance(value, functools._lru_cache_wrapper):
                    _replace(patch, name, value, functools.cache(value.__wrapped__))
        statements = zip(ast.parse(source).body, ast.parse(broken).body, strict=True)
        before, after = next(pair for pair in statements if ast.dump(pair[0]) != ast.dump(pair[1]))
        if isinstance(after, ast.FunctionDef | ast.ClassDef):
            _replace_functions(patch, module, before, after)
        else:
            changed: dict = {}
            exec(_compiled(module, after), vars(module), changed)
            for name, value in changed.items():
                _replace(patch, name, getattr(module, name), value)
        with BROKEN(mutation.name if mutation.compiled else "numbers"):
            yield


def _replace(patch: pytest.MonkeyPatch, name: str, old: object, new: object) -> None:
    """Gives another value to all modules of the package and the tests that have imported one."""
    modules = [each for key, each in sys.modules.items() if key.startswith(("eqxdiff", "test_"))]
    for module in modules:
        if vars(module).get(name) is old:
            patch.setattr(module, name, new)


def _replace_functions(patch, module, before: ast.stmt, after: ast.stmt) -> None:
    """Gives the functions of a broken statement their broken code, in place: whoever holds such a
    function runs the broken code."""
    pairs = zip(_functions(before), _functions(after), strict=True)
    changed = [
        (name, old, new) for (name, old), (_, new) in pairs if ast.dump(old) != ast.dump(new)
    ]
    assert changed, f"line {before.lineno} of {module.__name__}: no function has changed"
    codes = _codes(_compiled(module, after))
    for name, old, new in changed:
        function = _resolve(module, name)
        patch.setattr(function, "__code__", codes[name])
        if ast.dump(old.args) != ast.dump(new.args):
            evaluate = lambda node: eval(ast.unparse(node), vars(module))
            values = {
                arg.arg: evaluate(node)
                for arg, node in zip(new.args.kwonlyargs, new.args.kw_defaults, strict=True)
                if node is not None
            }
            patch.setattr(function, "__kwdefaults__", values)
            patch.setattr(function, "__defaults__", tuple(map(evaluate, new.args.defaults)))


def _compiled(module: types.ModuleType, statement: ast.stmt) -> types.CodeType:
    return compile(ast.Module([statement], []), str(module.__file__), "exec")


def _functions(node: ast.stmt, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions and methods of a statement, by qualified name."""
    if isinstance(node, ast.FunctionDef):
        yield prefix + node.name, node
    elif isinstance(node, ast.ClassDef):
        for child in node.body:
            yield from _functions(child, f"{prefix}{node.name}.")


def _codes(code: types.CodeType) -> dict[str, types.CodeType]:
    """All code within some code, by qualified name."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    codes = {one.co_qualname: one for one in inner}
    return {**codes, **{name: each for one in inner for name, each in _codes(one).items()}}


def _resolve(module: types.ModuleType, name: str) -> types.FunctionType:
    """The plain function of a qualified name, under whatever wraps it."""
    value = functools.reduce(getattr, name.split("."), module)
    value = getattr(value, "fget", getattr(value, "__func__", value))
    function = inspect.unwrap(value)
    assert isinstance(function, types.FunctionType), f"{name} is no function"
    return function
