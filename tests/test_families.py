"""Every family has all its pieces: the list to go by when adding one."""

import json
import tomllib
from pathlib import Path

import pytest

import eqxdiff
from eqxdiff.checkpoint import leaf_paths, read_table
from eqxdiff.models import FAMILIES
from eqxdiff.sharding import logical_axes


PACKAGE = Path(eqxdiff.__file__).parent
TESTS = Path(__file__).parent
FOLDERS = sorted(path.parent for path in (PACKAGE / "models").glob("*/family.py"))
COMPONENTS = [(family, name) for family in FAMILIES for name in family.components]


def example_config(family, model: str, name: str):
    fields = json.loads(family.example(model)[f"{name}/config.json"])
    return family.components[name].parse(fields)


def test_every_folder_is_registered():
    assert {path.name for path in FOLDERS} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_a_family_has_its_files(path):
    for name in ("__init__.py", "config.py", "family.py", "README.md"):
        assert (path / name).is_file(), f"{path.name} lacks {name}"
    assert (TESTS / "models" / f"test_{path.name}.py").is_file(), "no parity test"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_model_has_manifests(family):
    """Of each component, and of its ControlNets."""
    checkpoints = json.loads((TESTS / "manifests" / "checkpoints.json").read_text())
    for model, preset in family.presets.items():
        if preset.embedded:  # what others need a manifest of is here itself
            continue
        controlnet = {"controlnet"} if preset.controls else set()
        assert set(checkpoints[model]) == set(family.components) | controlnet
        for manifest in checkpoints[model].values():
            assert (TESTS / "manifests" / f"{manifest}.txt").is_file(), manifest


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_the_readme_names_every_model(path):
    family = next(family for family in FAMILIES if family.name == path.name)
    text = (path / "README.md").read_text()
    for model, preset in family.presets.items():
        assert f"`{model}`" in text
        assert preset.repository in text


@pytest.mark.parametrize(("family", "name"), COMPONENTS, ids=lambda it: getattr(it, "name", it))
def test_a_component_has_a_table(family, name):
    path = Path(__file__).parents[1] / "weights_map" / f"{family.components[name].table}.toml"
    tomllib.loads(path.read_text())
    assert read_table(family.components[name].table).name == family.components[name].table


@pytest.mark.parametrize(("family", "name"), COMPONENTS, ids=lambda it: getattr(it, "name", it))
def test_every_leaf_matches_one_sharding_rule(family, name):
    component = family.components[name]
    for model in family.presets:
        skeleton = component.skeleton(example_config(family, model, name))
        for path, leaf in leaf_paths(skeleton).items():
            logical_axes(path, leaf.ndim, component.rules)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_preset_is_complete(family):
    for model, preset in family.presets.items():
        assert preset.summary
        assert preset.embedded or preset.repository.count("/") == 1
        assert family.example(model)
