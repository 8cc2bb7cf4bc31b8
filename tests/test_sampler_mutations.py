"""Every constant of schedules and solvers, broken one at a time: each must fail a parity test."""

import pytest
import test_schedule
import test_solvers
from helpers import compiled_fast
from mutate import mutated, read_mutations


MUTATIONS = read_mutations("sampling")


@compiled_fast()
def check(name: str) -> None:
    """The test that has to fail."""
    match name.split(" ", 1):
        case ["flow", kind]:
            test_schedule.test_flow_schedules_are_those_of_diffusers_bit_for_bit(kind)
        case ["ays"]:
            tables = test_schedule.test_the_tables_lie_at_their_published_timesteps
            for model, timesteps in tables.pytestmark[0].args[1]:
                tables(model, timesteps)
        case ["ays", "steps"]:
            test_schedule.test_align_your_steps_is_the_published_table_in_ten_steps()
        case ["moments"]:
            for h in (0.49, 0.51, 2.0):
                test_solvers.test_the_moments_of_unipc_are_integrals(h)
        case ["lcm", "boundary"]:
            test_solvers.test_lcm_joins_the_network_to_x_at_timestep_0(0.1, 0.2, 0.8**0.5)
        case _:
            test_solvers.test_samplers_of_ddpms_agree_with_diffusers(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({mutation.check for mutation in MUTATIONS}))
def test_the_checks_pass_unbroken(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_seen(mutation):
    with mutated(mutation), pytest.raises(AssertionError):
        check(mutation.check)
