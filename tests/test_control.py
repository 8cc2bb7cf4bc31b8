"""Control pictures: read from the command line, prepared, and refused where they cannot serve."""

import json
from pathlib import Path

import numpy as np
import pytest
from command import Cli, Outcome, cli as cli, pixels
from eqxdiff.cli.control import ControlOption
from PIL import Image
from sd_files import picture, write_controlnet

import eqxdiff
from eqxdiff.control import canny, shows_edges
from eqxdiff.convert.example import write_example


SIZE = ("--width", "64", "--height", "64", "--steps", "2", "--seed", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    write_example("sd15", folder / "sd15")
    write_controlnet(folder / "net", "sd15")
    write_controlnet(folder / "net-xl", "sdxl")
    Image.fromarray(picture(0, 64, 64)).save(folder / "photo.png")
    Image.fromarray(picture(0, 64, 96)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def generate(cli, files, tmp_path, monkeypatch) -> Cli:
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Outcome:
        argv = [str(word).replace("FILES", str(files)) for word in argv]
        return cli("generate", "sd15", "--weights", files / "sd15", "-p", "a cat", *SIZE, *argv)

    return run


def test_an_option_names_a_net_a_picture_a_scale_and_when():
    parse = ControlOption.parse
    assert parse("canny=a.png") == ControlOption("canny", Path("a.png"))
    assert parse("canny=a.png@0.5") == ControlOption("canny", Path("a.png"), 0.5)
    whole = ControlOption("me/net", Path("my@2.png"), 0.5, 0.1, 0.75)
    assert parse("me/net=my@2.png@.5:0.1-0.75") == whole
    for text in ("canny", "=a.png", "canny="):
        with pytest.raises(eqxdiff.SettingError, match="write NET=IMAGE"):
            parse(text)


def test_a_file_whose_name_ends_like_a_scale_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a@2").touch()
    assert ControlOption.parse("canny=a@2") == ControlOption("canny", Path("a@2"))


def test_canny_finds_the_edges_of_a_square():
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = 200
    edges = canny(image)
    assert edges.shape == image.shape
    assert set(np.unique(edges)) == {0, 255}
    assert 100 < (edges[:, :, 0] == 255).sum() < 140  # four sides of 32
    assert shows_edges(edges)
    assert not shows_edges(image)
    assert not shows_edges(picture(0, 64, 64))


def test_a_control_picture_shapes_the_picture_and_is_recorded(generate):
    control = ("--control", "FILES/net=FILES/photo.png@0.8")
    run = generate("-o", "a.png", *control, "--json")
    assert run.status == 0
    (record,) = run.json["controls"]
    assert record["scale"] == 0.8
    assert record["image"] == "photo.png"
    assert record["prepared"] is None
    assert "controlnet" in run.json["weights"]["parts"]
    assert generate("-o", "b.png", "--control", "FILES/net=FILES/photo.png@0").status == 0
    assert np.abs(pixels("a.png") - pixels("b.png")).max() > 8


def test_photographs_become_edges_for_canny_and_edges_stay(files, monkeypatch, tmp_path):
    from eqxdiff.cli.control import open_controls, read_picture
    from eqxdiff.cli.progress import TextReport

    monkeypatch.chdir(tmp_path)
    photo = files / "photo.png"
    Image.fromarray(canny(read_picture(photo))).save("edges.jpg", quality=90)
    options = [ControlOption("canny", path) for path in (photo, Path("edges.jpg"))]
    opened = open_controls(options, guess=False, as_is=False, report=TextReport(True))
    assert [record["prepared"] for record in opened.record] == ["canny", None]
    assert np.array_equal(opened.images[0].image, canny(read_picture(photo)))
    assert np.array_equal(opened.images[1].image, read_picture(Path("edges.jpg")))
    opened = open_controls(options, guess=True, as_is=True, report=TextReport(True))
    assert np.array_equal(opened.images[0].image, read_picture(photo))
    assert opened.images[0].guess


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--control", "FILES/net=FILES/wide.png"], "A control image is 96x64 and the picture 64x"),
        (["--control", "FILES/net=FILES/none.png"], "There is no picture"),
        (["--control", "FILES/net=FILES/broken.png"], "cannot be read: is it one?"),
        (["--control", "FILES/net=FILES"], "cannot be read: Is a directory"),
        (["--control", "FILES/net=FILES/photo.png@1:0.6-0.7"], "acts on none of 2 steps"),
        (["--control", "FILES/net=FILES/photo.png@1:0.6-7"], "out of range: it is from 0 to 1"),
        (["--control", "FILES/net-xl=FILES/photo.png"], "The ControlNet does not fit the UNet"),
        (["--control", "cany=FILES/photo.png"], "knows no ControlNet 'cany': it knows canny,"),
        (["--control-guess"], "--control-guess would be ignored without --control."),
        (["--unet", "FILES/none.safetensors"], "There is no folder"),
        (["--transformer", "FILES/net"], "sd15 has no component transformer"),
        (["--eta", 0.5], "The sampler pndm has no"),
        (["--guidance", 0.5], "--guidance 0.5 is out of range"),
        (["--guidance", 1, "-n", "x"], "sd15 would ignore --negative-prompt"),
        (["--guidance", 0, "--guidance-rescale", 0.5], "sd15 would ignore --guidance-rescale"),
        (["--guidance-rescale", 2], "--guidance-rescale 2.0 is out of range"),
        (["--sigmas", "3,x"], "write numbers with commas between"),
        (["--sigmas", "3,4", "--sampler", "euler"], "must fall, from at most"),
        (["--sigmas", "9,8,7", "--sampler", "euler"], "levels for 3 steps, not for 2"),
        (["--sigmas", "9,8", "--sampler", "ddim"], "has timesteps of its own and cannot take"),
        (["--sampler", "DPM++ 2M Karras", "--schedule", "beta"], "--schedule beta"),
        (["--clip-skip", 2], "--clip-skip 2 is out of range"),
        (["--crop", "1,1"], "sd15 would ignore --crop"),
        (["--original-size", "64"], "write WIDTHxHEIGHT"),
        (["--shift", 3], "sd15 would ignore --shift"),
    ],
)
def test_what_cannot_be_is_refused(generate, tmp_path, argv, message):
    run = generate(*argv)
    assert run.status == 1
    assert message in run.error
    assert list(tmp_path.glob("*.png")) == []


def test_flux_has_no_controlnets(cli, files, tmp_path):
    write_example("flux-dev", tmp_path / "dev")
    control = f"{files}/net={files}/photo.png"
    argv = ("--weights", tmp_path / "dev", "-p", "a", *SIZE, "--control", control)
    assert "There are no ControlNets for flux-dev." in cli("generate", "flux-dev", *argv).error


def test_lightning_is_made_for_some_numbers_of_steps():
    with pytest.raises(eqxdiff.SettingError, match="made for 1, 2, 4, 8 steps, not for 3"):
        eqxdiff.open_model("sdxl-lightning", steps=3)


def test_a_part_of_another_place_takes_the_place_of_the_models_own(files, tmp_path):
    write_example("sd15", tmp_path / "other", seed=5)
    for spec in (
        tmp_path / "other/unet",
        tmp_path / "other/unet/diffusion_pytorch_model.safetensors",
    ):
        pipe = eqxdiff.open_model("sd15", str(files / "sd15"), parts={"unet": str(spec)})
        unet = pipe.load(["unet"])["unet"]
        own = eqxdiff.open_model("sd15", str(tmp_path / "other")).load(["unet"])["unet"]
        assert np.array_equal(unet.conv_in.weight, own.conv_in.weight)
        assert json.dumps(pipe.identity)


def test_a_controlnet_without_a_config_is_like_the_unet(files, tmp_path):
    file = tmp_path / "net.safetensors"
    file.write_bytes((files / "net" / "diffusion_pytorch_model.safetensors").read_bytes())
    plan = eqxdiff.open_model("sd15", str(files / "sd15"), controlnets=[str(file)])
    assert plan.configs["controlnet"].unet == plan.configs["unet"]
    assert plan.configs["controlnet"].downscale == 8
