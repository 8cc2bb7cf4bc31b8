"""Every constant and convention of the autoencoder, broken one at a time: each must fail a test."""

import pytest
import test_vae
from helpers import compiled_fast
from mutate import mutated, read_mutations


MUTATIONS = read_mutations("vae")


@compiled_fast()
def check(name: str) -> None:
    """The test that has to fail."""
    test, _, kind = name.partition("-")
    reference = test_vae.read_reference()
    match test:
        case "decode":
            test_vae.test_decoding_agrees_with_diffusers(None, reference, kind, "square")
        case "encode":
            test_vae.test_encoding_agrees_with_diffusers(None, reference, kind, "square")
        case "norms":
            test_vae.test_every_norm_has_the_epsilon_of_diffusers(reference, kind)
        case "posterior":
            test_vae.test_the_posterior_is_that_of_diffusers(reference)
        case "tiles":
            test_vae.test_tiles_hardly_differ_from_the_whole(None, 4, 0.005, 0.008)
        case _:
            raise ValueError(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({mutation.check for mutation in MUTATIONS}))
def test_the_checks_pass_unbroken(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_seen(mutation):
    with mutated(mutation, fresh=[test_vae]), pytest.raises(AssertionError):
        check(mutation.check)
