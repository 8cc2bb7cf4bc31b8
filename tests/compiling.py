"""How much XLA optimises in tests.

This module imports nothing of the package, which has to be imported after the hook that checks its
types.
"""

import contextlib

import jax
import pytest


FAST = {
    "test_bulk",
    "test_artefact",
    "test_cli",
    "test_cli_errors",
    "test_embedded",
    "test_gradients",
    "test_hosts",
    "test_lora_cli",
    "test_lora_kinds",
    "test_lora_loading",
    "test_lora_runtime",
    "test_passes",
    "test_training_recipe",
    "test_training_run",
}
"""The modules whose tests are compiled in less time. Those of parity choose for each test."""

LEVEL = jax.make_user_context()
"""Part of the key of everything that JAX compiles."""


@contextlib.contextmanager
def compiled_fast(fast: bool = True):
    """Lets XLA leave out most optimisations, which take most of the time of many tests.

    Within it nothing is run that was compiled outside, and the other way round.

    **Arguments:**

    - `fast`: whether to do so, or to compile as users do.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, fast)
    try:
        with LEVEL("fast" if fast else None), pytest.MonkeyPatch.context() as patch:
            patch.setenv(name.upper(), str(int(fast)))  # for the processes that a test starts
            yield
    finally:
        jax.config.update(name, before)
