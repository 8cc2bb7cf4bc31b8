"""Compiled programs are kept for the next process, and what compiling costs is told truly."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from command import SMALL, cli as cli, dev as dev, generate as generate


def compilation_settings() -> dict[str, object]:
    names = [name for name in dir(jax.config) if "compilation_cache" in name]
    return {name: getattr(jax.config, name) for name in names}


def test_the_second_process_finds_the_programs_of_the_first(dev, tmp_path):
    """Without being asked, in the user's cache folder; and it makes the same picture."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("XLA_FLAGS", None)

    def process(name: str):
        script = "import sys; from importlib.metadata import entry_points as e; sys.exit("
        script += "[*e(group='console_scripts', name='eqxdiff')][0].load()())"
        argv = ["generate", "flux-dev", "--weights", dev, *SMALL, "-p", "a cat", "-s", "1"]
        run = subprocess.run(
            [sys.executable, "-c", script, *map(str, argv), "--json", "-o", f"{name}.png"],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=True,
        )
        return json.loads(run.stdout)

    first, second = process("first"), process("second")
    folder = tmp_path / "cache" / "eqxdiff" / "xla"
    assert first["compiled"]["cache"] == second["compiled"]["cache"] == str(folder)
    assert any(folder.iterdir())
    assert first["compiled"]["cache_hits"] < first["compiled"]["programs"] / 2
    assert second["compiled"]["cache_hits"] == second["compiled"]["programs"] > 0
    assert second["timings"]["compile_seconds"] < first["timings"]["compile_seconds"]
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_a_folder_may_be_named_or_none_be_used(generate, tmp_path):
    before = compilation_settings()
    run = generate("-p", "a cat", "--steps", 1, "--compile-cache", tmp_path / "mine", "--json")
    assert run.json["compiled"]["cache"] == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    run = generate("-p", "a cat", "--steps", 1, "--no-compile-cache", "--json")
    assert run.json["compiled"]["cache"] is None
    assert compilation_settings() == before


def test_a_folder_that_jax_is_told_to_use_stays(generate, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    try:
        run = generate("-p", "a cat", "--steps", 1, "--json")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert run.json["compiled"]["cache"] == str(tmp_path / "jax")


def test_a_folder_that_cannot_be_used_is_an_error_only_where_it_was_asked_for(
    generate, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    run = generate("-p", "a cat", "--steps", 1, "--json")
    assert run.json["compiled"]["cache"] is None
    run = generate("-p", "a cat", "--steps", 1, "--compile-cache", tmp_path / "file" / "cache")
    assert run.error.endswith("file/cache cannot be used: Not a directory.")
    assert len(list(Path().iterdir())) == 1  # that of the first run


def test_time_is_counted_once_though_one_function_traces_another():
    cache = importlib.import_module("eqxdiff.cli.cache")
    meter = cache.CompileMeter()
    meter._spans = [(2.0, 3.0), (1.0, 4.0), (3.5, 5.0), (7.0, 8.0)]
    assert meter.seconds == pytest.approx(5.0)


def test_the_meter_counts_programs():
    """And no longer than it is open."""
    cache = importlib.import_module("eqxdiff.cli.cache")
    function = jax.jit(lambda x: jnp.sin(x) * 3)
    with cache.CompileMeter() as meter:
        function(jnp.ones(3))
        first = meter.programs
        assert first >= 1
        assert meter.seconds > 0
        function(jnp.ones(3) + 1)
        again = meter.programs
        function(jnp.ones((3, 3)))
        assert meter.programs > again
    last = meter.programs
    function(jnp.ones((4, 4)))
    assert meter.programs == last
