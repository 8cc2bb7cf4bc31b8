"""Every convention of the families around a UNet, broken one at a time: each must fail a parity
test."""

import pytest
from helpers import compiled_fast
from mutate import mutated, read_mutations
from sd_checks import check_latents, check_picture, check_prompt


MUTATIONS = read_mutations("sd")
CHECKS = {"prompt": check_prompt, "latents": check_latents, "picture": check_picture}


@compiled_fast()
def check(name: str, root) -> None:
    """The test that has to fail."""
    stage, case = name.split()
    CHECKS[stage](case, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sd")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({mutation.check for mutation in MUTATIONS}))
def test_the_checks_pass_unbroken(name, root):
    check(name, root)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_seen(mutation, root):
    with mutated(mutation), pytest.raises(AssertionError):
        check(mutation.check, root)
