"""What a PNG says about itself, read as others read it."""

import importlib
import json
import re
from importlib.metadata import version

import pytest
from command import cli as cli, dev as dev, generate as generate, pixels
from PIL import Image

import eqxdiff


PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A pair of the last line, as A1111 reads it."""


def read_parameters(text: str) -> dict[str, str]:
    """The prompts and settings, by A1111's grammar."""
    *lines, last = text.strip().split("\n")
    assert len(PAIR.findall(last)) >= 3
    fields = {"Prompt": "", "Negative prompt": ""}
    where = "Prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            where, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        fields[where] += ("\n" if fields[where] else "") + line
    for key, value in PAIR.findall(last):
        fields[key] = json.loads(value) if value.startswith('"') else value
    return fields


def chunks(path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)


def test_parameters_are_as_a1111_reads_them(generate):
    run = generate("-p", "a cat,\nasleep: 😀", "-s", 3, "--num-images", 2, "-g", 3.3)
    text = chunks(run.files[1])["parameters"]
    assert read_parameters(text) == {
        "Prompt": "a cat,\nasleep: 😀",
        "Negative prompt": "",
        "Steps": "2",
        "Sampler": "Euler",
        "CFG scale": "1",
        "Distilled CFG Scale": "3.3",
        "Seed": "4",
        "Size": "64x64",
        "Model": "flux-dev",
        "Version": f"eqxdiff {version('eqxdiff')}",
    }


def test_parameters_tell_all_that_was_applied(generate):
    run = generate(
        *("-p", "a cat", "-n", "blurred", "--cfg", 2, "--prompt-2", 'red: "a, b"\\'),
        *("--negative-prompt-2", "", "--sampler", "heun", "--shift", 1.5),
    )
    fields = read_parameters(chunks(run.files[0])["parameters"])
    assert fields["Negative prompt"] == "blurred"
    assert fields["Prompt 2"] == 'red: "a, b"\\'
    assert fields["Negative prompt 2"] == ""
    assert fields["CFG scale"] == "2"
    assert fields["Sampler"] == "Heun"
    assert fields["Shift"] == "1.5"


def test_the_eqxdiff_chunk_is_enough_to_make_the_picture_again(generate, dev):
    run = generate("-p", "a cat 😀", "-s", 3, "--num-images", 2, "-o", "{index}.png")
    told = json.loads(chunks("1.png")["eqxdiff"])
    assert told == {
        "schema": 1,
        "model": "flux-dev",
        "weights": dict(eqxdiff.open_model("flux-dev", str(dev)).source.identity),
        "dtype": dict.fromkeys(("text_encoder", "text_encoder_2", "transformer", "vae"), "float32"),
        "compute_dtype": "float32",
        "attention": dict.fromkeys(("77x4x8", "512x4x8", "528x4x16", "64x1x16"), "xla"),
        "noise": {"source": "seed", "generator": "threefry2x32"},
        "batch_size": 1,
        "device": "cpu",
        "versions": {name: version(name) for name in ("eqxdiff", "jax", "jaxlib")},
        "prompt": "a cat 😀",
        "seed": 4,
        "index": 1,
        "settings": {
            "steps": 2,
            "width": 64,
            "height": 64,
            "guidance": 3.5,
            "max_sequence_length": 512,
        },
    }
    again = generate("-p", told["prompt"], "-s", told["seed"], "-o", "again.png")
    assert (pixels(again.files[0]) == pixels(run.files[1])).all()


def test_noise_from_a_file_is_told(generate):
    generate("-p", "a cat", "--save-latents", "a.npy", "-o", "a.png")
    run = generate("-p", "a cat", "--noise", "a.npy", "-o", "b.png")
    noise = json.loads(chunks(run.files[0])["eqxdiff"])["noise"]
    assert noise["source"] == "file"
    assert re.fullmatch("[0-9a-f]{64}", noise["sha256"])


def test_no_metadata_is_no_metadata(generate):
    run = generate("-p", "a secret", "--no-metadata", "-o", "a.png")
    assert chunks(run.files[0]) == {}
    assert b"secret" not in run.files[0].read_bytes()


@pytest.mark.parametrize(
    "value", ["", "plain", "a, b", "a: b", "a\nb", '"', '"quoted"', " x ", "é"]
)
def test_every_value_comes_back(value):
    quote = importlib.import_module("eqxdiff.pipeline.record").quote
    line = f"Steps: 1, Value: {quote(value)}, Size: 64x64, Model: x"
    fields = read_parameters("prompt\n" + line)
    assert fields["Value"] == value
    assert fields["Size"] == "64x64"
