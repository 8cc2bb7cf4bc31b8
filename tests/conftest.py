import gc
import os
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
import typecheck as typecheck
from compiling import FAST, compiled_fast
from jaxtyping import install_import_hook


jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook("eqxdiff", "typecheck.check")


MOST_MAPPINGS = 25_000
"""Each compiled program takes some memory mappings, of which Linux gives a process 65,530."""


@pytest.fixture(scope="module", autouse=True)
def _spare_mappings():
    """Frees compiled programs between test files, before the process has too many mappings: then
    the compiler would crash."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def level_of_module(request):
    """Less time in the compiler for some modules, their own fixtures included."""
    with compiled_fast(request.module.__name__ in FAST):
        yield


@pytest.fixture
def fast():
    """Less time in the compiler for one test."""
    with compiled_fast():
        yield


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
