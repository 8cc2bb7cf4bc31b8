"""Adapters from the Hub, by repository and file, through the cache."""

import json
import os
import subprocess
import sys

import numpy as np
import safetensors.numpy
import test_hub
from test_hub import hub as hub


ADAPTER = safetensors.numpy.save(
    {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": np.ones((2, 8), np.float32),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": np.ones((8, 2), np.float32),
    }
)
SCRIPT = """
import json, sys, time
time.sleep = lambda seconds: None
from eqxdiff import EqxdiffError
from eqxdiff.lora import load

for spec in json.loads(sys.argv[1]):
    try:
        adapter = load(spec)
        print(json.dumps([adapter.name, adapter.format.name, len(adapter.patches)]))
    except EqxdiffError as error:
        print(json.dumps(str(error)))
"""


def ask(home, endpoint: str, *specs: str) -> list:
    """What a new process makes of each spec."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(specs)]
    run = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_repository_or_a_file_in_it_is_an_adapter(tmp_path, hub, monkeypatch):
    endpoint, requests, _ = hub
    files = {"README.md": b"-", "styles/ink.safetensors": ADAPTER, "old.bin": b"-"}
    monkeypatch.setattr(test_hub, "FILES", files)
    specs = ("owner/model:styles/ink.safetensors@0.5", "owner/model", "owner/model:old.bin")
    one, only, pickle = ask(tmp_path, endpoint, *specs)
    assert one[1:] == only[1:] == ["kohya", 1]
    assert "is a pickle" in pickle
    fetched = [line for line in requests if line.startswith("GET /owner/")]
    assert len(fetched) == 1  # the second time it is in the cache, and nothing else is wanted


def test_what_is_not_clear_or_not_there_is_said(tmp_path, hub, monkeypatch):
    endpoint, _, _ = hub
    files = {"a.safetensors": ADAPTER, "b.safetensors": ADAPTER}
    monkeypatch.setattr(test_hub, "FILES", files)
    specs = (
        "owner/model",
        "owner/model:c.safetensors",
        "no/repository",
        "gated/licence:a.safetensors",
    )
    several, missing, nothing, gated = ask(tmp_path, endpoint, *specs)
    assert (
        "has several files, name one as owner/model:FILE: a.safetensors, b.safetensors" in several
    )
    assert "c.safetensors" in missing
    assert "no/repository" in nothing
    assert "licence" in gated
