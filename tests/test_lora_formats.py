"""Every format of LoRA: merged and at run time, the change is that of the definition."""

import pytest
from helpers import relative_error
from lora_files import FORMATS, Draft, components, exported, realized

from eqxdiff import lora


@pytest.fixture(scope="module", params=FORMATS)
def case(request):
    """A draft of the format with its adapter, and the name that the format is reported by."""
    model, format_name, make = FORMATS[request.param]
    draft = Draft(model)
    make(draft)
    return draft, format_name, draft.adapter()


def check_changes(draft: Draft, modules, strength: float = 1) -> None:
    """Each tensor is what it was plus the expected change, and no other tensor has changed."""
    after = exported(draft.model, modules)
    for name, before in draft.base.items():
        change = draft.expected.get(name)
        if change is None:
            assert (after[name] == before).all(), name
        else:
            assert relative_error(after[name], before + strength * change) < 5e-7, name
            wanted = strength * change
            assert relative_error(after[name].astype("f8") - before, wanted) < 5e-6, name


def test_merging_changes_what_the_file_says(case):
    draft, _, adapter = case
    check_changes(draft, lora.merge(components(draft.model), adapter.scaled(0.7)), 0.7)


def test_at_run_time_layers_compute_with_the_same_weights(case):
    draft, _, adapter = case
    check_changes(draft, realized(lora.apply(components(draft.model), adapter)))


def test_the_report_tells_the_format_and_the_layers(case):
    draft, format_name, adapter = case
    (report,) = lora.fit(components(draft.model), adapter).reports
    weights = [name for name in draft.expected if name.endswith(".weight")]
    assert report.format == format_name
    assert sum(report.layers.values()) == len(weights)
    for component, count in report.layers.items():
        assert count == sum(name.startswith(f"{component}:") for name in weights)
    assert not report.unused
