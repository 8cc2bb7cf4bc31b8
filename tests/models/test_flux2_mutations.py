"""Every convention of FLUX.2 and Qwen3, broken one at a time: each must fail a parity test."""

import numpy as np
import pytest
import test_flux2
import test_qwen3
from helpers import FIXTURES, compiled_fast
from mutate import mutated, read_mutations
from tokenizer_files import write_qwen

from eqxdiff import SettingError
from eqxdiff.text import Tokenizer


MUTATIONS = read_mutations("flux2")


@compiled_fast()
def check(name: str, root) -> None:
    """The test that has to fail."""
    if name in test_flux2.CASES:
        test_flux2.check_case(name, root, reference("flux2"))
    elif name == "qwen3":
        test_qwen3.check_states(reference("qwen3"))
    elif name == "tokens":
        tokenizers = {False: Tokenizer.load(write_qwen(root / "tokens", whole=False))}
        compare = test_qwen3.test_ids_of_awkward_prompts_equal_those_of_transformers
        compare(reference("qwen3"), tokenizers, False)
    elif name == "numbers":
        test_flux2.check_numbers(reference("flux2"))
    else:
        raise ValueError(name)


def reference(name: str) -> dict:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("flux2")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({mutation.check for mutation in MUTATIONS}))
def test_the_checks_pass_unbroken(name, root):
    check(name, root)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_seen(mutation, root):
    with mutated(mutation, fresh=[test_flux2]), pytest.raises((AssertionError, SettingError)):
        check(mutation.check, root)
