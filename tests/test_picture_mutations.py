"""Every convention of pictures from pictures, broken one at a time: each must fail a parity test."""

import pytest
from mutate import mutated, read_mutations
from picture_checks import check_encoding, check_stages, compiled_fast


MUTATIONS = read_mutations("pictures")
CHECKS = {"encoding": check_encoding, "stages": check_stages}


def check(name: str, root) -> None:
    """The test that has to fail."""
    stage, case = name.split()
    with compiled_fast():
        CHECKS[stage](case, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_seen(mutation, root):
    with mutated(mutation), pytest.raises(AssertionError):
        check(mutation.check, root)
