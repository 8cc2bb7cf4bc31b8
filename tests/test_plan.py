"""What `eqxdiff plan` foretells: counts, memory, time, advice, and what it refuses."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from command import SMALL, cli as cli, dev as dev, generate as generate
from helpers import MANIFESTS, read_manifest

from eqxdiff import SettingError
from eqxdiff.models import FAMILIES, find_model
from eqxdiff.pipeline import Blueprint, open_model
from eqxdiff.plan import (
    Choice,
    Skeletons,
    Target,
    advise,
    auto_mesh,
    count,
    find_target,
    look_ahead,
    make_plan,
    targets,
)
from eqxdiff.plan.ahead import Wish
from eqxdiff.plan.compiler import collective_bytes


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PUBLISHED = [(f, m) for f in FAMILIES for m, p in f.presets.items() if not p.embedded]


@pytest.mark.parametrize(("family", "model"), PUBLISHED, ids=lambda it: getattr(it, "name", it))
def test_the_published_sizes_of_every_model_are_known(family, model):
    """They parse, they belong together, and the dtypes are those of the components."""
    sizes = family.published(model)
    read = lambda path: json.loads(sizes.files[path])
    configs = {n: c.parse(read(f"{n}/config.json")) for n, c in family.components.items()}
    configs["pipeline"] = family.parse_index(read("model_index.json"))
    configs["scheduler"] = family.parse_scheduler(read("scheduler/scheduler_config.json"))
    assert family.bind(model, find_model(model)[1].defaults, configs).name == model
    assert set(sizes.dtypes) == set(family.components)


@pytest.fixture(scope="module")
def flux() -> Skeletons:
    return Skeletons.published("flux-dev", compute_dtype="bfloat16")


def test_parameters_are_those_of_the_published_files(flux):
    names = json.loads((MANIFESTS / "checkpoints.json").read_text())["flux-dev"]
    plan = make_plan(flux, find_target("v6e-4"), Choice(mesh={"fsdp": 4}))
    for component in plan.components:
        shapes = read_manifest(names[component.name])
        twice = (
            "position_ids",
            "encoder.embed_tokens.weight",
        )  # the latter is T5's `shared.weight`
        wanted = sum(math.prod(s) for n, s in shapes.items() if not n.endswith(twice))
        assert component.parameters == wanted
        assert component.nbytes == 2 * wanted
        assert component.nbytes / 4 <= component.device < component.nbytes / 3
    transformer = next(one for one in plan.components if one.name == "transformer")
    assert transformer.device == pytest.approx(transformer.nbytes / 4, rel=0.01)


def test_operations_are_those_that_pytorch_counts(flux):
    """FlopCounterMode of PyTorch 2.13 on the networks of diffusers 0.42.1, attention included."""
    plan = make_plan(flux, find_target("v6e-1"), Choice())
    counted = {"encode": 4.845e12 + 0.0133e12, "step": 74.385e12, "decode": 10.472e12}
    for name, wanted in counted.items():
        assert plan.program(name).flops == pytest.approx(wanted, rel=1e-3), name


def test_time_is_the_roofline_and_memory_what_the_stages_hold(flux):
    chip = find_target("v5e-1").chip
    plan = make_plan(flux, find_target("v5e-1"), Choice())
    step = plan.program("step")
    assert (step.calls, step.bound) == (28, "compute")
    assert step.seconds == pytest.approx(step.flops / chip.narrow)
    assert plan.seconds == pytest.approx(sum(one.seconds * one.calls for one in plan.programs))
    whole = sum(one.nbytes for one in plan.components)
    text = sum(one.nbytes for one in plan.components if one.stage == "text")
    assert whole < plan.peak < 1.05 * whole
    dropped = make_plan(flux, find_target("v5e-1"), Choice(keep="nowhere"))
    assert plan.peak - dropped.peak == text


def test_a_mesh_divides_weights_and_work_and_pays_in_collectives(flux):
    target = find_target("v6e-4")
    alone, spread, split = (
        make_plan(flux, target, Choice(mesh=mesh)).program("step")
        for mesh in ({}, {"fsdp": 4}, {"tensor": 4})
    )
    assert spread.flops == alone.flops  # of a picture for each device
    assert spread.collective == pytest.approx(0.75 * 17.2e9, rel=0.01)  # but for its own
    assert split.flops == pytest.approx(alone.flops / 4, rel=0.01)
    # Two sums of 4608 x 3072 numbers in each of 19 double and 38 single blocks, in float32.
    sums = 4608 * 3072 * 4 * (2 * 19 + 38)
    assert split.collective == pytest.approx(2 * 0.75 * sums, rel=0.02)


def test_the_formula_agrees_with_the_compiler_for_tpus():
    """The compiler's figures are recorded by benchmarks/plan_against_compiler.py."""
    recorded = json.loads((BENCHMARKS / "results" / "plan_against_compiler.json").read_text())
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from plan_against_compiler import CASES
    finally:
        sys.path.remove(str(BENCHMARKS))
    for name, facts in recorded["cases"].items():
        assert 0.9 < facts["peak"]["ratio"] < 1.1, name
    for name in [n for n in recorded["cases"] if n.startswith("flux")][:2]:
        model, program, wanted, mesh, settings = CASES[name]
        skeletons = Skeletons.published(model, dtype="bfloat16", compute_dtype="bfloat16")
        ours = make_plan(skeletons, find_target(wanted), Choice(settings, None, mesh))
        peak = ours.program(program).arguments + ours.program(program).temporary
        assert peak == pytest.approx(recorded["cases"][name]["peak"]["compiler"], rel=0.1), name


@pytest.mark.slow
def test_the_plan_is_the_memory_of_a_real_load_and_run():
    script = [sys.executable, str(BENCHMARKS / "plan_against_run.py"), "--width", "768"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [*script, "--size", "256"], capture_output=True, text=True, check=True, env=environment
    )
    facts = json.loads(done.stdout)
    assert 0.9 < facts["load"]["ratio"] < 1.1, facts
    assert 0.9 < facts["run"]["ratio"] < 1.1, facts


def test_products_loops_and_live_arrays_are_counted():
    def chain(weights, x):
        turn = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(turn, x, weights)[0]

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    cost = count(chain, shape(5, 64, 64), shape(32, 64), axes=[("layers", "hidden", None)])
    assert cost.flops == {"float32": 5 * 2 * 32 * 64 * 64}
    assert cost.reduced == 5 * 32 * 64 * 4  # the products sum over the axis that `tensor` splits
    assert cost.temporary >= 2 * 32 * 64 * 4
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME")
    cost = count(conv, shape(1, 8, 16, 16), shape(4, 8, 3, 3))
    assert cost.operations == 2 * 4 * 16 * 16 * 8 * 9


def test_collectives_of_a_compiled_program_count_in_each_turn_of_a_loop():
    text = """HloModule step
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8,4]{1,0} all-gather(%x), dimensions={0}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body, TRIPS
  %r = bf16[16]{0} all-reduce(%y), to_apply=%add
}"""
    trips = 'backend_config={"known_trip_count":{"n":"3"}}'
    assert collective_bytes(text.replace("TRIPS", trips)) == 3 * 8 * 4 * 4 + 16 * 2


@pytest.fixture(scope="module")
def tiny(dev):
    return Skeletons.of(open_model("flux-dev", str(dev)))


def machine(memory: float, devices: int = 1) -> Target:
    chip = dataclasses.replace(targets.CHIPS["h100"], memory=memory, overhead=0.0)
    return Target("h100", chip, devices)


def test_advice_is_the_nearest_change_that_fits(tiny, dev):
    settings = {"height": 64, "width": 64, "max_sequence_length": 16}
    plan = make_plan(tiny, machine(1e12), Choice(settings))
    narrow = lambda dtype: Skeletons.of(open_model("flux-dev", str(dev), dtype=dtype))
    told = lambda memory, devices=1: advise(
        make_plan(tiny, machine(memory, devices), Choice(settings)), tiny, narrow
    )
    assert str(told(plan.peak - 1)).startswith("`release` text (")
    dropped = make_plan(tiny, machine(1e12), Choice(settings, keep="nowhere"))
    assert str(told(dropped.peak - 1)).startswith("`dtype` bfloat16 (")
    both = make_plan(narrow("bfloat16"), machine(1e12), Choice(settings, keep="nowhere"))
    assert str(told(both.peak + 1)).startswith("`release` text and `dtype` bfloat16 (")
    assert told(1) is None
    chosen = auto_mesh(tiny, machine(plan.peak - 1, 4), Choice(settings))
    assert chosen.fits
    assert math.prod(chosen.choice.mesh.values()) == 4
    with pytest.raises(SettingError, match=r"needs .* GiB of memory on a device, and h100 has"):
        auto_mesh(tiny, machine(1, 4), Choice(settings))


def test_advice_splits_weights_that_fit_no_device(flux):
    told = lambda devices: str(
        advise(make_plan(flux, machine(20e9, devices), Choice()), flux, lambda dtype: flux)
    )
    assert told(4).startswith("`mesh` data=2,fsdp=2 (")
    assert told(1).startswith("`target` h100-2 with `mesh` fsdp=2 (")


def test_generate_refuses_what_cannot_fit_before_it_reads_weights(generate, monkeypatch):
    monkeypatch.setattr(targets, "_free", lambda: 0.52 * 2**30)
    monkeypatch.setattr(Blueprint, "load", lambda *_, **__: pytest.fail("weights were read"))
    error = generate("-p", "a cat", "--width", 1024, "--height", 1024).error
    assert error.startswith("flux-dev needs ")
    assert "this machine has 0.52 GiB. This fits: --" in error


def test_generate_chooses_the_mesh(generate):
    run = generate("-p", "a cat", "--steps", 1, "--mesh", "auto", "--json")
    assert run.json["images"]


def test_the_command_prints_a_table_and_json(cli, dev):
    words = ("plan", "flux-dev", "--weights", dev, "--size", "64x64", "--steps", 2)
    table = cli(*words, "--target", "v6e-4", "--mesh", "fsdp=2,data=-1", "--formula").out
    assert "mesh fsdp=2,data=2, 4 of 64x64, 2 steps" in table
    assert "It fits." in table
    facts = cli(*words, "--target", "rtx4090", "--json").json
    assert facts["fits"]
    assert facts["source"] == "formula"
    assert {one["name"] for one in facts["programs"]} == {"encode", "begin", "step", "decode"}
    assert facts["assumes"]["memory_gb_per_s"] == 1008
    train = cli(*words, "--target", "h100", "--train", "lora", "--json").json
    assert train["programs"][0]["name"] == "train"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "h10"), "--target 'h10' is not known. Did you mean h100? There are v5e-1"),
        (("--target", "v5p-5"), "has half a chip"),
        (("--size", "64"), "--size 64 is not understood"),
        (("--target", "v6e-4", "--mesh", "data=3,fsdp=-1"), "must be one of 1, 2, 4"),
        (("--target", "v6e-4", "--mesh", "rows=2"), "sizes of some of cfg, data, fsdp, context"),
        (("--target", "v6e-4", "--mesh", "data=8"), "has 8 devices and v6e-4 has 4"),
        (
            ("--target", "v6e-4", "--mesh", "data=4", "--batch", 6),
            "over data into 4 parts, which does not divide --batch-size 6: sizes that do are 1, 2",
        ),
    ],
)
def test_bad_input_is_told(cli, dev, words, message):
    assert message in cli("plan", "flux-dev", "--weights", dev, "--formula", *words).error


def test_look_ahead_knows_no_file(monkeypatch):
    """Nothing is fetched: the sizes are the package's own."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("fetched"))
    plan, advice = look_ahead(Wish("flux-schnell", {"steps": 2}, target="v5p-8", formula=True))
    assert plan.fits
    assert advice is None
    assert SMALL
