"""That mutations fit the code, and that they stay out of the way of other tests."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import count_compilations
from mutate import Mutation, find, mutated, read_mutations

from eqxdiff.nn import mlp


FILES = sorted(path.stem for path in Path(__file__).parent.glob("mutations/*.toml"))
GELU = Mutation("gelu", "", "approximate=True", "approximate=False", ("nn",))


@pytest.mark.parametrize("name", FILES)
def test_every_mutation_fits_the_code(name):
    """All that do not are named at once, so that the texts can follow a change of the code."""
    wrong = []
    for mutation in read_mutations(name):
        try:
            find(mutation)
        except AssertionError as error:
            wrong.append(str(error).split("\n")[0])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("old", "times"),
    [("approximate=0.5", "0 times"), ("jax.nn", "times: nn/")],
)
def test_a_text_that_is_not_there_once_is_an_error(old, times):
    with pytest.raises(AssertionError, match=times):
        find(Mutation("gelu", "", old, "", ("nn",)))


@pytest.mark.parametrize(
    "old", ["b * sin,", "sin , a", "jnp.stack([jnp.cos(angle),jnp.sin(angle)]"]
)
def test_line_breaks_do_not_count(old):
    path, source, broken = find(Mutation("", "", old, "broken", ("nn/rope",)))
    assert path.name == "rope.py"
    assert ("broken" in source, "broken" in broken) == (False, True)


def test_what_others_compiled_is_kept_and_what_is_broken_is_not_met():
    """Under `filter_jit`, in a scan, and for a function that was imported by name before."""
    gelu = mlp.gelu_tanh

    @eqx.filter_jit
    def run(x):
        return jax.lax.scan(lambda x, _: (gelu(x), None), x, length=2)[0]

    x = jnp.float32(0.7)
    before = float(run(x))
    with count_compilations() as compiled:
        with mutated(GELU):
            broken = float(run(x))
        number = len(compiled)
        assert float(run(x)) == before
        assert len(compiled) == number > 0
    assert broken != before


def test_constants_change_wherever_they_are_imported():
    from eqxdiff.vae import autoencoder, blocks

    with mutated(Mutation("", "", "EPS = 1e-6", "EPS = 2e-6", ("vae",))):
        assert autoencoder.EPS == blocks.EPS == 2e-6
    assert autoencoder.EPS == blocks.EPS == 1e-6


def test_caches_of_tests_are_empty_within_and_kept():
    import test_vae

    kept = test_vae.skeleton
    with mutated(GELU, fresh=[test_vae]):
        assert test_vae.skeleton is not kept
    assert test_vae.skeleton is kept
