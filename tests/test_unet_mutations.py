"""Every constant and convention of the UNet and ControlNet, broken one at a time: each must fail a
test."""

import pytest
import test_controlnet
import test_unet
from helpers import compiled_fast
from mutate import mutated, read_mutations


MUTATIONS = read_mutations("unet")


@compiled_fast()
def check(name: str) -> None:
    """The test that has to fail."""
    test, _, kind = name.partition("-")
    unet, control = test_unet.read_reference(), test_controlnet.read_reference()
    match test:
        case "unet":
            test_unet.test_the_unet_agrees_with_diffusers(None, unet, kind, "square")
        case "odd":
            test_unet.test_the_unet_agrees_with_diffusers(None, unet, kind, "odd")
        case "norms":
            test_unet.test_every_norm_has_the_epsilon_of_diffusers(unet, kind)
        case "guess":
            test_controlnet.test_residuals_agree_with_diffusers(None, control, kind, "guess")
        case "control":
            names = ("edges", "depth")
            test_controlnet.test_a_controlled_unet_agrees_with_diffusers(None, control, kind, names)
        case _:
            raise ValueError(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({mutation.check for mutation in MUTATIONS}))
def test_the_checks_pass_unbroken(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_seen(mutation):
    with mutated(mutation, fresh=(test_unet, test_controlnet)), pytest.raises(AssertionError):
        check(mutation.check)
