import os


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
