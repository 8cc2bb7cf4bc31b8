"""Every constant and convention of FLUX.1, broken one at a time: each must fail a parity test."""

import numpy as np
import pytest
import test_clip
import test_flux1
import test_flux1_pipeline
import test_t5
from helpers import FIXTURES, compiled_fast, write_checkpoint
from mutate import mutated, read_mutations


MUTATIONS = read_mutations("flux1")


@compiled_fast()
def check(name: str, folders) -> None:
    """The test that has to fail."""
    if name in test_flux1_pipeline.CASES:
        test_flux1_pipeline.check_case(name, folders, reference("flux1_pipeline"))
    elif name == "norms":
        test_flux1.test_norms_have_the_epsilons_of_diffusers(reference("flux1"))
    elif name == "clip":
        for kind in test_clip.KINDS:
            test_clip.test_outputs_agree_with_transformers(reference("clip"), kind, "pooled")
        test_clip.test_the_end_is_the_highest_id_or_the_first_end_token(reference("clip"))
    elif name == "t5":
        for kind in test_t5.KINDS:
            test_t5.test_the_encoding_agrees_with_transformers(reference("t5"), kind)
    else:
        raise ValueError(name)


def reference(name: str) -> dict:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux1")
    return {model: write_checkpoint(root / model, model) for model in ("flux-dev", "flux-schnell")}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({mutation.check for mutation in MUTATIONS}))
def test_the_checks_pass_unbroken(name, folders):
    check(name, folders)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_seen(mutation, folders):
    with mutated(mutation), pytest.raises(AssertionError):
        check(mutation.check, folders)
