"""Breaks the package on purpose, one place at a time, to see that a test notices."""

import importlib
import inspect
import sys
import textwrap
from typing import NamedTuple

import jax


class Mutation(NamedTuple):
    """A change of source text in one function or method, and what has to notice it.

    `where` is `module:function` or `module:Class.method` within the package; `old` occurs in it
    exactly once. Without a function, `old` is the name of a constant and `new` its value.
    """

    name: str
    check: str
    where: str
    old: str
    new: str


def apply(mutation: Mutation, monkeypatch, *, traced: bool = True) -> None:
    """Puts the mutation in place for the length of a test.

    **Arguments:**

    - `traced`: whether it is in what JAX compiles, so that nothing compiled before holds.

    **Raises:** `AssertionError` where the code has changed so that the mutation no longer fits.
    """
    module_name, _, path = mutation.where.partition(":")
    module = importlib.import_module(f"eqxdiff.{module_name}")
    if traced:
        jax.clear_caches()
    if not path:
        assert hasattr(module, mutation.old)
        monkeypatch.setattr(module, mutation.old, eval(mutation.new, vars(module)))
        return
    *owners, name = path.split(".")
    owner = module
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
    assert source.count(mutation.old) == 1, f"{mutation.old!r} is not once in {mutation.where}"
    broken: dict = {}
    code = compile(source.replace(mutation.old, mutation.new), mutation.where, "exec")
    exec(code, vars(module), broken)
    monkeypatch.setattr(owner, name, broken[name])
    if not owners:  # a function may have been imported by name elsewhere
        importing = ("eqxdiff.", "test_")
        for other in [m for n, m in sys.modules.items() if n.startswith(importing)]:
            for alias in [a for a, value in vars(other).items() if value is original]:
                monkeypatch.setattr(other, alias, broken[name])
