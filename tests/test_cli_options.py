"""The options of `eqxdiff generate` are those that the models declare, and errors name them."""

import dataclasses
import importlib
import json
import re

import pytest
from command import SMALL, cli as cli, dev as dev, generate as generate, pixels

from eqxdiff.convert.example import write_example
from eqxdiff.models import applied, declarations, families, find_model, settings_classes


PANELS = ["Picture", "Guidance", "Sampling", "Weights", "LoRA", "Memory", "Processes", "Output"]


@pytest.fixture(scope="module")
def program():
    """All commands, as Typer knows them."""
    return importlib.import_module("eqxdiff.cli.app")._program(["generate"])


@pytest.fixture(scope="module")
def parameters(program):
    """The options and the argument of `eqxdiff generate`."""
    return program.commands["generate"].params


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny checkpoint of a model of each family."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write_example(name, folder / name) for name in ("flux-dev", "sd15", "sdxl")}


def spelled(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"


def test_every_setting_is_an_option_and_every_option_is_declared(parameters):
    """As an own option of the command, as a setting of a family, or as one of its components."""
    flags = {flag for parameter in parameters for flag in parameter.opts}
    order = importlib.import_module("eqxdiff.cli.order").Order
    own = {field.name for field in dataclasses.fields(order)} - {"settings", "parts", "as_json"}
    wanted = {*map(spelled, own - {"model"}), "model", "--json", "-p", "-s", "-o", "-q"}
    for cls in settings_classes():
        for name, declared in declarations(cls).items():
            wanted |= {spelled(name), *map(spelled, declared.flags)}
        wanted |= {spelled(part) for part in cls.components}
    assert flags == wanted


def test_every_option_has_a_panel_and_tells_its_default(parameters):
    shown = [parameter for parameter in parameters[1:] if not parameter.hidden]
    assert list(dict.fromkeys(option.rich_help_panel for option in shown)) == PANELS
    assert "[default: 1]" in next(o for o in shown if o.name == "num_images").help


def test_the_help_of_every_command_is_sentences_with_defaults(program):
    commands = {**program.commands, **program.commands["lora"].commands}
    commands.pop("lora")
    for name, command in commands.items():
        assert command.help.endswith("."), name
        for option in command.params:
            told = option.help or ""
            assert "The same" not in told
            if option.param_type_name == "argument" or option.required:
                assert re.fullmatch(r"[A-Z].*\.", told), (name, option.name)
            elif not option.hidden:
                pattern = r"[A-Z].*\. \[default: [^\[\]]+\]"
                assert re.fullmatch(pattern, told), (name, option.name)


@pytest.mark.parametrize("columns", [80, 200])
def test_the_help_fits_the_terminal(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = cli("generate", "--help").out.splitlines()
    assert max(map(len, lines)) <= columns
    assert not any("…" in line for line in lines)
    titles = [line.split()[1] for line in lines if line.startswith("╭")]
    assert titles == ["Arguments", "Options", *PANELS]
    flags = [match[1] for line in lines if (match := re.match(r"│ (--[\w-]+) ", line))]
    assert "--negative-original-size" in flags
    assert "--guidance-scale" not in flags  # it is named beside --guidance
    for panel in "\n".join(lines).split("╭")[3:]:
        line = next(line for line in panel.splitlines() if re.match(r"│ --", line))
        start = re.search(r"  [A-Z][^ ]* [a-z]", line)
        assert start is not None
        assert columns - start.start() >= 35


def test_a_setting_has_the_names_that_others_give_it(generate):
    """Both together are refused, since one of them would be ignored."""
    run = generate("-p", "a", "--guidance-scale", "nan")
    assert run.error == "--guidance nan is not a finite number."
    run = generate("-p", "a", "--num-inference-steps", 1)
    assert run.error == "--num-inference-steps is another name of --steps: give one of them."


@pytest.mark.parametrize(
    ("model", "argv"),
    [("flux-dev", ("--eta", 0.5)), ("sd15", ("--crop", "1,1")), ("sdxl", ("--shift", 3))],
)
def test_a_setting_of_another_family_is_refused(cli, models, tmp_path, monkeypatch, model, argv):
    monkeypatch.chdir(tmp_path)
    run = cli("generate", model, "--weights", models[model], "-p", "a", *SMALL, *argv)
    family, _ = find_model(model)
    takes = ", ".join(spelled(name) for name in sorted(declarations(family.settings)))
    assert run.status == 1
    assert f"{model} would ignore {argv[0]}." in run.error
    assert run.error.endswith(f"It takes {takes}.")


def test_the_tables_of_models_follow_the_declarations(cli):
    lines = cli("models").out.splitlines()
    rows = {row["name"]: row for row in cli("models", "--json").json}
    for family in families():
        takes = sorted(declarations(family.settings))
        heading = lines.index(f"{', '.join(family.presets)} take:")
        assert lines[heading + 1].split(", ") == [
            "  " * (i == 0) + name.replace("_", "-") for i, name in enumerate(takes)
        ]
        for name, preset in family.presets.items():
            assert rows[name]["takes"] == takes
            assert rows[name]["defaults"] == json.loads(json.dumps(applied(preset.defaults)))


@pytest.mark.parametrize(
    ("argv", "message", "told"),
    [
        ("generate", "`guidance_start` is 2, `steps` 0.", "--guidance-start is 2, --steps 0."),
        ("generate", "`controls`, `loras`: see `eqxdiff models`", "--control, --lora: see `eqxd"),
        (
            "generate",
            "`image` and `mask`, not `compute_dtype`",
            "--image and --mask, not --compute",
        ),
        ("lora extract", "`rank` 0 is out of range, `loras` too", "--rank 0 is out of range, `lor"),
        ("lora merge", "`loras` and `rank`", "--lora and `rank`"),
        ("train", "`resume` or another `output`", "--resume or another --output"),
        ("convert", "name it with `model`, not `steps`", "name it with --model, not `steps`"),
        ("inspect", "`model` is unknown; `text`", "`model` is unknown; `text`"),
    ],
)
def test_an_error_names_the_options_of_the_command_that_is_called(argv, message, told):
    flagged = importlib.import_module("eqxdiff.cli.app").flagged
    assert flagged(message, argv.split()).startswith(told)


def test_guidance_may_act_on_a_part_of_the_steps(generate):
    """On the second step of two, or on both, without another program."""
    arguments = ("-p", "a cat", "-s", 3, "--cfg", 4, "-n", "grey")
    runs = {
        "both": generate(*arguments, "-o", "both.png", "--json"),
        "whole": generate(*arguments, "--guidance-start", 0, "--guidance-end", 1, "-o", "w.png"),
        "second": generate(*arguments, "--guidance-start", 0.5, "-o", "second.png", "--json"),
    }
    assert {name: run.status for name, run in runs.items()} == dict.fromkeys(runs, 0)
    both, whole, second = (pixels(f"{name}.png") for name in ("both", "w", "second"))
    assert (both == whole).all()
    assert (both != second).any()
    assert runs["second"].json["settings"]["guidance_start"] == 0.5
    assert runs["second"].json["compiled"]["programs"] == 0
