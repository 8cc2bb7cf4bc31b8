"""FLUX.2 klein from prompt and reference pictures to picture against diffusers, and its files."""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import cli as cli, dev as dev
from flux2_files import CASES, PICTURES, fake_picture, original_transformer, write_case
from helpers import (
    FIXTURES,
    compiled_fast,
    count_compilations,
    fake_noise,
    fake_tensor,
    read_manifest,
    relative_error,
)
from PIL import Image
from test_layout import Header, under, wanted

import eqxdiff
from eqxdiff import SettingError
from eqxdiff._errors import CheckpointError, ConfigError
from eqxdiff.checkpoint import check, export_infos, export_tensors, load_module, read_table
from eqxdiff.convert.example import write_example
from eqxdiff.convert.recognise import claim, describe
from eqxdiff.models import find_model
from eqxdiff.models.flux2 import Flux2TransformerConfig
from eqxdiff.models.flux2.schedule import compute_empirical_mu
from eqxdiff.pictures import resize_and_cut
from eqxdiff.pipeline import expand, share, stack_examples
from eqxdiff.tensors import InMemory


SETTINGS = ("steps", "guidance", "negative_prompt", "max_sequence_length")
FAMILY = find_model("flux2-klein-4b")[0]


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "flux2.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("flux2")


@functools.cache
def load(name: str, root):
    folder = root / name
    if not folder.exists():
        write_case(folder, CASES[name])
    return eqxdiff.load(CASES[name]["model"], str(folder), dtype=jnp.float32)


def given(case) -> dict:
    """Settings and pictures. Where there are pictures the first decides on the size."""
    more = {name: case[name] for name in SETTINGS if name in case}
    if "images" in case:
        return {**more, "image": [fake_picture(*size) for size in case["images"]]}
    return {**more, "height": case["height"], "width": case["width"]}


def prepared(pipe, encoded, case, noise):
    """The batch of a case."""
    settings = given(case)
    pictures = {"image": settings.pop("image")} if "image" in settings else {}
    requests = expand(encoded, seed=0, num_images=1, given=settings, **pictures)
    requests = share(requests, "noise", noise, noise.shape[1:])
    return stack_examples([eqxdiff.prepare(pipe, each) for each in requests], len(requests))


def check_case(name: str, root, reference) -> None:
    """Every stage of one case. The mutation test breaks our code and sees this fail."""
    case, pipe = CASES[name], load(name, root)
    settings = {key: value for key, value in given(case).items() if key != "image"}
    noise = fake_noise(len(case["prompts"]), 16, case["height"] // 16, case["width"] // 16)

    def agrees(stage: str, value, floor: float = 5e-6, factor: float = 5) -> None:
        error = relative_error(value, reference[f"{name}/{stage}"])
        bound = max(floor, factor * reference[f"{name}/{stage}/rounding"])
        assert error < bound, f"{stage}: {error:.1e} is above {bound:.1e}"

    encoded = pipe.encode(case["prompts"], **settings)
    agrees("txt", encoded.roles["prompt"].txt)
    batch = prepared(pipe, encoded, case, noise)
    if "images" in case:
        latents = [each[0].reshape(-1, 16) for each in batch.shared.references]
        agrees("references", np.concatenate(latents))
    step = next(eqxdiff.steps(pipe.blueprint, pipe.stage("denoiser"), batch))
    # of the network alone: the rounding of the latents would be much of so small a step
    before, after = np.float64(batch.recipe.schedule.sigma[0, :2])
    away = np.asarray(step.x0.transpose(0, 3, 1, 2), np.float64) - noise
    agrees("moved", away * (before - after) / before)

    size = len(case["prompts"])
    result = eqxdiff.generate(pipe, encoded, noise=noise, batch_size=size, **given(case))
    agrees("final", result.latents, 2e-5, 10)
    images = np.stack([np.asarray(image, np.int16) for image in result.images])
    difference = np.abs(images - reference[f"{name}/images"])
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_every_stage_agrees_with_diffusers(name, root, reference):
    check_case(name, root, reference)
    assert reference[f"{name}/other"] > 0.1, "the reference does not see the prompt"


def check_pictures(reference) -> None:
    takes = FAMILY.references({"vae": FAMILY.components["vae"].parse({"batch_norm_eps": 1e-4})})
    for width, height in PICTURES:
        name = f"pictures/{width}x{height}"
        cut = resize_and_cut(fake_picture(width, height), *takes.sizes(width, height))
        assert cut.shape[:2] == tuple(reference[f"{name}/size"])
        np.testing.assert_allclose(cut[::97, ::89] / 127.5 - 1, reference[name], atol=0.01)


def check_numbers(reference) -> None:
    sizes = [(tokens, steps) for tokens in (256, 4096, 4300, 4301) for steps in (4, 50)]
    ours = [compute_empirical_mu(*size) for size in sizes]
    np.testing.assert_allclose(ours, reference["shifts"], rtol=1e-12)
    check_pictures(reference)


def test_references_and_shifts_are_those_of_diffusers(reference):
    check_numbers(reference)


def test_nothing_recompiles_for_what_changes(root):
    """Another prompt of another length, negative prompt, seed and guidance."""
    pipe, case = load("base", root), CASES["base"]
    settings = {**given(case), "image": [fake_picture(64, 64)]}
    with compiled_fast():
        first = eqxdiff.generate(pipe, case["prompts"], **settings)
        with count_compilations() as compiled:
            for change in (
                {"prompts": "a dog on a hill of sand"},
                {"negative_prompt": "rain"},
                {"seed": 3},
                {"guidance": 7.5},
                {"image": [fake_picture(70, 66)]},
            ):
                more = {"prompts": case["prompts"], **settings, **change}
                other = eqxdiff.generate(pipe, more.pop("prompts"), **more)
                assert relative_error(other.latents, first.latents) > 1e-4, change
    assert not compiled


REFUSED = {
    "flux2-klein-4b would ignore `guidance`: it is distilled": {"guidance": 3.0},
    "flux2-klein-4b would ignore `negative_prompt`: it is distilled": {"negative_prompt": "x"},
    "would ignore `mask`: it makes whole pictures anew": {"mask": fake_picture(64, 64)[..., 0]},
    "would ignore `strength`": {"strength": 0.5},
    "There are 5 pictures for `image`, and flux2-klein-4b takes up to 4": {
        "image": [fake_picture(64, 64)] * 5
    },
    "is 63x64: give one of 64x64 pixels at least": {"image": fake_picture(63, 64)},
    "is 1000x100: its longer side may be 8 times the other": {"image": fake_picture(1000, 100)},
    "The height 40 is not a multiple of 16": {"height": 40},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_model_does_not_take_is_refused(why, root):
    with pytest.raises(SettingError, match=why):
        eqxdiff.generate(load("klein", root), "a", **REFUSED[why])


@pytest.mark.usefixtures("fast")
def test_the_command_line_takes_several_pictures(cli, dev, tmp_path):
    """By the model of the package's example; other models begin with one picture."""
    folder = write_example("flux2-klein-4b", tmp_path / "tiny")
    for name, size in {"a": (96, 64), "b": (64, 70)}.items():
        Image.fromarray(fake_picture(*size)).save(tmp_path / f"{name}.png")
    images = [word for name in "ab" for word in ("--image", tmp_path / f"{name}.png")]
    own = ("-p", "x", "-s", 1, "--steps", 1, *images, "-o", tmp_path / "new.png")
    short = ("--max-sequence-length", 32)
    run = cli("generate", "flux2-klein-4b", "--weights", folder, *own, *short, "--json")
    assert run.status == 0, run.err
    assert [each["file"] for each in run.json["image"]] == ["a.png", "b.png"]
    with Image.open(tmp_path / "new.png") as made:
        assert made.size == (96, 64)
    run = cli("generate", "flux-dev", "--weights", dev, *own, "--overwrite")
    assert run.error == "There are 2 pictures for --image, and flux-dev begins with one."


def test_an_edit_without_a_picture_is_refused_where_the_model_needs_one(root):
    takes = load("klein", root).blueprint.references
    with pytest.raises(SettingError, match="x edits pictures: give it one by `image`"):
        eqxdiff.models.References(1, 2**20, 16, required=True).check_count(0, "x")
    takes.check_count(0, "flux2-klein-4b")


def test_base_models_need_guidance_for_a_negative_prompt(root):
    with pytest.raises(SettingError, match=r"would ignore `negative_prompt` without classifier"):
        eqxdiff.generate(load("base", root), "a", guidance=1.0, negative_prompt="x")


def test_a_prompt_without_room_is_cut_at_its_end(root):
    blueprint = load("klein", root).blueprint
    settings = blueprint.resolve({"max_sequence_length": 32})
    text = blueprint.model.tokenize(blueprint.tokenizers, "a " * 30 + "z", settings, "prompt")
    assert text.parts["text_encoder"].dropped.endswith("a a z")
    assert text.tokens.length == 32


SIZES = {
    "klein_4b": (3_875_544_576, (5, 20, 24, 7680), False),
    "klein_9b": (9_078_581_248, (8, 24, 32, 12288), False),
    "dev": (None, (8, 48, 48, 15360), True),
}


def transformer(sizes, guidance):
    fields = ("num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim")
    config = dict(zip(fields, sizes, strict=True))
    component = FAMILY.components["transformer"]
    return component.skeleton(Flux2TransformerConfig(**config, guidance_embeds=guidance))


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("layout", ["", "_bfl"])
def test_full_size_transformers_map_onto_the_published_tensors(kind, layout):
    count, sizes, guidance = SIZES[kind]
    skeleton, table = transformer(sizes, guidance), read_table(f"flux2_transformer{layout}")
    manifest = read_manifest(f"flux2_{kind}{layout}")
    check(manifest, table, skeleton)
    assert {name: info.shape for name, info in export_infos(skeleton, table).items()} == manifest
    size = sum(leaf.size for leaf in jax.tree.leaves(skeleton))
    assert size == (count or size)
    summary = kind.replace("klein_", "[klein] ").upper().replace("KLEIN", "klein")
    assert describe(Header(manifest)).summary == f"FLUX.2 {summary.replace('DEV', '[dev]')}"


def test_the_full_size_autoencoder_maps_onto_the_published_tensors():
    component = FAMILY.components["vae"]
    skeleton = component.skeleton(component.parse({"_class_name": "AutoencoderKLFlux2"}))
    manifest = read_manifest("vae_flux2")
    check(manifest, read_table("vae"), skeleton)
    exported = {n: info.shape for n, info in export_infos(skeleton, read_table("vae")).items()}
    assert {**exported, "bn.num_batches_tracked": ()} == manifest
    assert sum(leaf.size for leaf in jax.tree.leaves(skeleton)) // 10**5 == 840
    original = read_manifest("vae_flux_ldm") | {
        "encoder.conv_out.weight": (64, 512, 3, 3),
        "encoder.conv_out.bias": (64,),
        "decoder.conv_in.weight": (512, 32, 3, 3),
        "encoder.quant_conv.weight": (64, 64, 1, 1),
        "encoder.quant_conv.bias": (64,),
        "decoder.post_quant_conv.weight": (32, 32, 1, 1),
        "decoder.post_quant_conv.bias": (32,),
        "bn.running_mean": (128,),
        "bn.running_var": (128,),
        "bn.num_batches_tracked": (),
    }
    check(original, read_table("vae_ldm"), skeleton)


def check_original_file(reference) -> None:
    """The tensors of an original file are those that diffusers converts it to."""
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
    layers = {"num_layers": 2, "num_single_layers": 3, "in_channels": 16}
    config = Flux2TransformerConfig(**sizes, **layers, axes_dims_rope=(4, 4, 4, 4))
    file = original_transformer(32, 16, 24, 16, 2, 3, guidance=True)
    tensors = {name: fake_tensor(name, shape) for name, shape in file.items()}
    skeleton = FAMILY.components["transformer"].skeleton(config)
    module = load_module(InMemory(tensors), read_table("flux2_transformer_bfl"), skeleton)
    made = export_tensors(module, read_table("flux2_transformer"))
    sums = {name: zlib.crc32(np.ascontiguousarray(array).tobytes()) for name, array in made}
    assert sums == json.loads(str(reference["single_file"]))


def test_an_original_file_holds_what_diffusers_converts_it_to(reference):
    check_original_file(reference)


def test_a_file_of_klein_given_as_flux_dev_is_told_apart():
    file = Header(under("model.diffusion_model", read_manifest("flux2_klein_4b_bfl")))
    with pytest.raises(CheckpointError, match=r"It looks like FLUX\.2 \[klein\] 4B\."):
        claim(file, wanted("flux-dev"), "klein.safetensors")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"axes_dims_rope": [8, 8]}, "axes_dims_rope: .* does not|four even"),
        ("transformer", {"out_channels": 3}, "out_channels must equal in_channels"),
        ("transformer", {"extra": 3}, "extra: an unknown field"),
        ("vae", {"patch_size": [1, 1]}, "patch_size: .* is not supported"),
        ("vae", {"scaling_factor": 0.3}, "scaling_factor is no field of this autoencoder"),
        ("vae", {"decoder_block_out_channels": [1]}, "decoder_block_out_channels"),
    ],
)
def test_configs_that_are_not_computed_are_named(part, change, message):
    fields = json.loads(FAMILY.example("flux2-klein-4b")[f"{part}/config.json"])
    with pytest.raises(ConfigError, match=message):
        FAMILY.components[part].parse({**fields, **change})
