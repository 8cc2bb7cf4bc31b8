"""A family of another package, found by its entry point, through the unchanged rest."""

import ast
import importlib
import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from command import cli as cli, pixels
from helpers import compiled_fast, count_compilations, fake_tensor, relative_error
from PIL import Image

import eqxdiff
from eqxdiff.checkpoint import leaf_paths
from eqxdiff.convert.example import write_example
from eqxdiff.models import FAMILIES, find_model
from eqxdiff.sharding import logical_axes
from eqxdiff.vae import AutoencoderKL


PLUGINS = Path(__file__).parent / "plugins"
PACKAGE = Path(eqxdiff.__file__).parent
CLI = Path(__file__).parents[1] / "cli"
NAME = "sketch-small"
SHOWN = {"COLUMNS": "200", "NO_COLOR": "1", "TERMINAL_WIDTH": "200"}


@pytest.fixture(scope="module", autouse=True)
def installed():
    """The package as `pip install` would leave it: a folder of sys.path, with its metadata."""
    with pytest.MonkeyPatch.context() as patch, compiled_fast():
        patch.syspath_prepend(PLUGINS)
        importlib.invalidate_caches()
        yield


@pytest.fixture(scope="module")
def drawing(installed, tmp_path_factory) -> Path:
    """A tiny checkpoint. Not to be changed: copy it."""
    return write_example(NAME, tmp_path_factory.mktemp("sketch") / "drawing")


@pytest.fixture(scope="module")
def pipe(drawing):
    return eqxdiff.load(NAME, str(drawing))


@pytest.fixture
def draw(cli, drawing, tmp_path, monkeypatch):
    """Runs `eqxdiff generate sketch-small` on the tiny checkpoint in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object):
        return cli("generate", NAME, "--weights", drawing, "--prompt", "a cat", "-s", 3, *argv)

    return run


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(make_picture()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def make_picture() -> np.ndarray:
    """A picture of 32 by 32 pixels, all of them different, (height, width, 3), uint8."""
    y, x = np.mgrid[:32, :32]
    return np.uint8(np.stack([8 * y, 8 * x, 4 * (x + y)], axis=-1))


def make_mask() -> np.ndarray:
    """White in the right half."""
    return np.uint8(np.tile(255 * (np.arange(32) >= 16), (32, 1)))


# ---------------------------------------------------------------- what it says of itself


def test_it_is_listed_with_its_settings(cli):
    text = cli("models").out
    assert re.search(rf"{NAME} +A toy .* nobody/{NAME} +4 steps, 32x32, boldness 1.0, words", text)
    takes = text.partition(f"{NAME} take:\n")[2]
    assert "boldness, guidance," in takes
    assert "sampler" not in takes
    assert "vae-tiling" not in takes
    (row,) = (row for row in cli("models", "--json").json if row["name"] == NAME)
    assert row["defaults"]["words"] == 24


def test_help_shows_its_settings_and_components(cli, monkeypatch):
    for name, value in SHOWN.items():
        monkeypatch.setenv(name, value)
    text = re.sub(r"[\s│]+", " ", cli("generate", "--help").out)
    assert "--boldness FLOAT How strongly the lines are drawn. [default: 1]" in text
    assert "--painter SPEC Read the painter from a file, folder, repository" in text


def test_random_writes_a_folder_that_generate_takes(cli, tmp_path, drawing):
    assert cli("random", NAME, tmp_path / "own").status == 0
    made = {path.relative_to(tmp_path / "own") for path in (tmp_path / "own").rglob("*.*")}
    assert Path("painter/diffusion_pytorch_model.safetensors") in made
    assert Path("scribe/model.safetensors") in made
    assert made == {path.relative_to(drawing) for path in drawing.rglob("*.*")}


def test_every_leaf_matches_one_sharding_rule():
    family, _ = find_model(NAME)
    for name, component in family.components.items():
        fields = json.loads(family.example(NAME)[f"{name}/config.json"])
        for path, leaf in leaf_paths(component.skeleton(component.parse(fields))).items():
            logical_axes(path, leaf.ndim, component.rules)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("sketch.family:RULES", "sketch.family:RULES is no eqxdiff Family"),
        ("sketch.nowhere:FAMILY", "sketch.nowhere:FAMILY cannot be loaded: No module named"),
    ],
)
def test_a_wrong_entry_point_is_named(cli, tmp_path, monkeypatch, entry, problem):
    folder = tmp_path / "wrong-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[eqxdiff.families]\nwrong = {entry}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for argv in (["models"], ["generate", "--help"]):
        assert problem in cli(*argv).error


# ---------------------------------------------------------------- pictures on the command line


def test_settings_reach_the_picture_and_its_metadata(draw):
    guided = "--guidance", 3
    runs = {
        "plain": (),
        "bold": ("--boldness", 2),
        "few words": ("--words", 3),
        "guided": guided,
        "negative": (*guided, "--negative-prompt", "a dog"),
    }
    pictures = {}
    for name, argv in runs.items():
        run = draw(*argv, "-o", f"{name}.png")
        assert run.status == 0, run.err
        pictures[name] = pixels(f"{name}.png")
        assert pictures[name].shape == (32, 32, 3)
    for i, one in enumerate(pictures.values()):
        for other in list(pictures.values())[:i]:
            assert np.abs(one - other).max() > 2
    with Image.open("bold.png") as image:
        record = json.loads(image.text["eqxdiff"])
        assert "Boldness: 2.0" in image.text["parameters"]
    assert record["model"] == NAME
    assert record["settings"]["boldness"] == 2
    assert set(record["dtype"]) == {"scribe", "painter", "press"}
    assert draw("-o", "again.png").status == 0
    assert np.array_equal(pixels("again.png"), pictures["plain"])


def test_a_picture_is_made_from_another(draw, photo):
    weak = draw("--image", photo, "--strength", 0.25, "-o", "weak.png")
    strong = draw("--image", photo, "--strength", 0.75, "-o", "strong.png")
    assert weak.status == strong.status == 0, weak.err
    with Image.open("weak.png") as image:
        assert json.loads(image.text["eqxdiff"])["settings"]["strength"] == 0.25
    mask = photo.with_name("mask.png")
    Image.fromarray(make_mask()).save(mask)
    part = draw("--image", photo, "--mask", mask, "-o", "part.png")
    assert part.status == 0, part.err
    none = draw("--image", photo, "--strength", 0, "-o", "none.png")
    assert "--strength 0 leaves none of 4 steps: raise it, or --steps" in none.error


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--boldness", 3), "--boldness 3.0 is out of range: it is from 0 to 2"),
        (("--words", 1), "--words 1 is out of range: it is from 2 to 64"),
        (("--negative-prompt", "x"), "would ignore --negative-prompt without"),
        (("--sampler", "heun"), "sketch-small would ignore --sampler. It takes --boldness, --g"),
        (("--vae-tiling",), "sketch-small would ignore --vae-tiling"),
        (("--unet", "x"), "sketch-small has no component unet: it has scribe, painter, press"),
        (("--width", 30), "The width 30 is not a multiple of 4"),
        (("--control", "canny=x.png"), "no picture x.png"),
    ],
)
def test_errors_name_the_flags(draw, argv, problem):
    assert problem in draw(*argv).error


def test_other_models_refuse_its_settings(cli, tmp_path):
    folder = write_example("flux-schnell", tmp_path / "other")
    argv = ("--weights", folder, "--prompt", "x", "--boldness", 1)
    error = cli("generate", "flux-schnell", *argv).error
    assert "flux-schnell would ignore --boldness" in error


def test_a_component_comes_from_elsewhere(draw, drawing, tmp_path):
    other = write_example(NAME, tmp_path / "other", seed=1)
    assert draw("--painter", other / "painter", "-o", "part.png").status == 0
    assert draw("-o", "own.png").status == 0
    assert np.abs(pixels("part.png") - pixels("own.png")).max() > 2


# ---------------------------------------------------------------- files


def test_inspect_names_it(cli, drawing, tmp_path):
    single = tmp_path / "one.safetensors"
    assert cli("convert", drawing, single).status == 0
    for source, layout in ((drawing, "diffusers"), (single, "single file")):
        told = cli("inspect", source, "--json").json
        assert told["models"] == [NAME]
        assert told["model"] == "Sketch small"
        assert told["layout"] == layout
        assert set(told["components"]) == {"scribe", "painter", "press"}
        assert not told["missing"] + told["extra"] + told["problems"]


def test_conversion_there_and_back_changes_no_bit(cli, drawing, draw, tmp_path):
    single, back = tmp_path / "one.safetensors", tmp_path / "back"
    assert cli("convert", drawing, single).status == 0
    names = safetensors.numpy.load_file(single)
    assert names["paint.layers.1.qkv.weight"].shape == (96, 32)
    assert "autoencoder.press_in.weight" in names
    assert cli("convert", single, back, "--configs", drawing).status == 0
    for path in drawing.rglob("*.safetensors"):
        before = safetensors.numpy.load_file(path)
        after = safetensors.numpy.load_file(back / path.relative_to(drawing))
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].tobytes() == after[name].tobytes()
    for name, problem in (("painter", "paint"), ("press", "autoencoder")):
        alone = tmp_path / f"{name}.safetensors"
        assert cli("convert", drawing, alone, "--only", name).status == 0
        assert not [key for key in safetensors.numpy.load_file(alone) if key.startswith(problem)]
    run = draw("--painter", tmp_path / "painter.safetensors", "-o", "single.png")
    assert run.status == 0, run.err


def test_what_is_left_over_in_a_single_file_is_named(cli, drawing, tmp_path):
    single = tmp_path / "one.safetensors"
    assert cli("convert", drawing, single).status == 0
    tensors = safetensors.numpy.load_file(single)
    tensors["paint.extra"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, single)
    error = cli("convert", single, tmp_path / "back", "--configs", drawing).error
    assert "It looks like Sketch small." in error
    assert "extra" in error


# ---------------------------------------------------------------- adapters


def kohya() -> dict[str, np.ndarray]:
    """A LoRA of rank 2 as kohya's scripts name it, with a fused layer of the single file."""
    layers = {
        "lora_painter_blocks_0_to_q": (32, 32),
        "lora_painter_layers_1_qkv": (96, 32),
        "lora_scribe_blocks_0_mlp_proj_in": (128, 32),
    }
    tensors = {}
    for name, (rows, columns) in layers.items():
        tensors[f"{name}.lora_up.weight"] = fake_tensor(f"{name}.up", (rows, 2), 4)
        tensors[f"{name}.lora_down.weight"] = fake_tensor(f"{name}.down", (2, columns), 4)
        tensors[f"{name}.alpha"] = np.array(2, np.float32)
    return tensors


@pytest.fixture
def style(tmp_path) -> Path:
    safetensors.numpy.save_file(kohya(), tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_a_lora_changes_the_picture(cli, draw, style):
    told = cli("lora", "inspect", style, "--json").json
    assert (told["base"], told["format"]) == ("Sketch", "kohya")
    assert draw("-o", "plain.png").status == 0
    for mode in ("merge", "runtime"):
        run = draw("--lora", style, "--lora-mode", mode, "-o", f"{mode}.png")
        assert run.status == 0, run.err
    assert np.abs(pixels("merge.png") - pixels("plain.png")).max() > 8
    assert np.abs(pixels("merge.png") - pixels("runtime.png")).max() <= 1
    half = draw("--lora", f"{style}@painter=0.5,scribe=0", "-o", "half.png")
    assert half.status == 0, half.err
    assert np.abs(pixels("half.png") - pixels("merge.png")).max() > 2


def test_a_lora_is_added_to_the_weights(drawing, style, pipe):
    """Of the fused layer, each of the three has its own rows."""
    merged, lora = eqxdiff.load(NAME, str(drawing), loras=[str(style)]), kohya()
    up, down = (lora[f"lora_painter_layers_1_qkv.lora_{part}.weight"] for part in ("up", "down"))
    before, after = pipe["painter"].blocks, merged["painter"].blocks
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        wanted = getattr(before, name).weight[1] + (up @ down)[32 * i : 32 * (i + 1)]
        assert relative_error(getattr(after, name).weight[1], wanted) < 1e-6
    assert np.array_equal(after.to_k.weight[0], before.to_k.weight[0])


def test_lora_merge_writes_a_folder_of_its_own(cli, drawing, style, tmp_path, draw):
    folder = tmp_path / "merged"
    run = cli("lora", "merge", NAME, folder, "--lora", style, "--weights", drawing)
    assert run.status == 0, run.err
    draw("--lora", style, "-o", "one.png")
    draw("--weights", folder, "-o", "two.png")
    assert np.abs(pixels("one.png") - pixels("two.png")).max() <= 1


# ---------------------------------------------------------------- the library


def test_a_batch_mixes_all_that_belongs_to_one_picture(pipe):
    """Prompts, boldness, guidance and its negative prompt, input pictures: one program for all."""
    make = eqxdiff.Request.make
    mixed = [
        make("a cat", seed=1, boldness=0.5, guidance=2.0),
        make("a much longer prompt", seed=2, boldness=1.5, guidance=4.0, negative_prompt="a dog"),
        make("", seed=3, guidance=3.0),
    ]
    alone = [eqxdiff.generate(pipe, [one]).latents[0] for one in mixed]
    eqxdiff.generate(pipe, mixed, batch_size=3)
    with count_compilations() as compiled:
        others = [make("another", seed=9, boldness=i / 2, guidance=1.5 + i) for i in range(3)]
        eqxdiff.generate(pipe, others, batch_size=3)
        again = eqxdiff.generate(pipe, mixed, batch_size=3)
    assert not compiled
    for one, other in zip(alone, again.latents, strict=True):
        assert relative_error(other, one) < 1e-5
    assert relative_error(again.latents[1], again.latents[0]) > 0.1


def test_two_loads_share_their_programs(pipe, drawing):
    eqxdiff.generate(pipe, "a cat")
    other = eqxdiff.load(NAME, str(drawing))
    assert jax.tree.structure(other) == jax.tree.structure(pipe)
    with count_compilations() as compiled:
        eqxdiff.generate(other, "a cat")
    assert not compiled


def test_boldness_can_be_vmapped(pipe):
    example = eqxdiff.prepare(pipe, "a cat", seed=3)
    values = jnp.asarray([0.0, 1.0, 2.0])
    sweep = lambda bold: eqxdiff.sample_latent(pipe, eqx.tree_at(lambda e: e.shared, example, bold))
    swept = jax.vmap(sweep)(values)
    for value, latent in zip(values, swept, strict=True):
        wanted = eqxdiff.generate(pipe, "a cat", seed=3, boldness=float(value)).latents[0]
        assert relative_error(latent.transpose(2, 0, 1), wanted) < 1e-5
    slope = jax.grad(lambda bold: sweep(bold).sum())(values[1])
    assert np.isfinite(slope)
    assert slope != 0


def test_padding_changes_nothing(pipe):
    """Other ids in its place leave the latent as it is, to the bit; more of it, but for rounding.

    The mask counts: without it the same padding does change the picture.
    """
    model, blueprint = pipe.blueprint.model, pipe.blueprint
    example = eqxdiff.prepare(pipe, "a cat", seed=3)
    text = model.tokenize(blueprint.tokenizers, "a cat", model.resolve({}), "prompt")
    length = text.parts["scribe"].length
    assert 2 < length < 12

    def latent(ids, mask):
        tokens = eqx.tree_at(lambda t: (t.tokens, t.mask), text.tokens, (ids, mask))
        encoded = model.encode(pipe.stage("text"), tokens, jnp.float32)
        conditions = jax.tree.map(lambda leaf: leaf[None], encoded)
        return eqxdiff.sample_latent(pipe, eqx.tree_at(lambda e: e.conditions, example, conditions))

    ids, mask = text.tokens.tokens, text.tokens.mask
    other = ids.at[length:].set(7)
    own = latent(ids, mask)
    assert np.array_equal(latent(other, mask), own)
    assert relative_error(latent(other, jnp.ones_like(mask)), own) > 1e-3
    short = eqxdiff.generate(pipe, "a cat", seed=3, words=12).latents[0]
    assert relative_error(short, own.transpose(2, 0, 1)) < 1e-5


def test_a_picture_begins_with_another(pipe):
    """The autoencoder is its own and draws no noise; the mask keeps half of its latent."""
    assert not isinstance(pipe["press"], AutoencoderKL)
    picture, mask = make_picture(), make_mask()
    signed = jnp.asarray(picture, jnp.float32) / 127.5 - 1
    clean = pipe["press"].encode(signed)
    weak, strong = (
        eqxdiff.generate(pipe, "a cat", seed=3, image=picture, strength=strength).latents[0]
        for strength in (0.25, 0.75)
    )
    bare = eqxdiff.generate(pipe, "a cat", seed=3).latents[0]
    whole = eqxdiff.generate(pipe, "a cat", seed=3, image=picture, strength=1.0).latents[0]
    assert np.array_equal(whole, bare)
    clean = clean.transpose(2, 0, 1)
    distances = [relative_error(latent, clean) for latent in (weak, strong, bare)]
    assert distances == sorted(distances)
    noise = np.ones((1, 4, 8, 8), np.float32)
    given = {"seed": 3, "image": picture, "strength": 0.25, "encode_noise": noise}
    assert np.array_equal(eqxdiff.generate(pipe, "a cat", **given).latents[0], weak)
    part = eqxdiff.generate(pipe, "a cat", seed=3, image=picture, mask=mask).latents[0]
    assert relative_error(part[:, :, :4], clean[:, :, :4]) < 1e-5
    assert relative_error(part[:, :, 4:], clean[:, :, 4:]) > 0.1


# ---------------------------------------------------------------- and the rest names no family


ALLOWED = {
    ("eqxdiff/vae/", "vae"): "the room of this autoencoder: its tables, and what its config is of",
    ("eqxdiff/text/", "text_encoder"): "what errors call the configs of CLIP and T5",
    ("eqxdiff/text/", "text_encoder_2"): "likewise",
    ("eqxdiff/text/", "transformer"): "a tensor of OpenCLIP",
    ("eqxdiff/pipeline/", "vae"): "the name of a stage, whatever the component in it is called",
    ("eqxdiff/plan/", "vae"): "the name of a stage, and of the setting that all tiled models have",
    ("cli/plan.py", "vae"): "the option of that setting",
    ("eqxdiff/training/", "vae"): "training makes this autoencoder, by the name that all give it",
    ("eqxdiff/models/_lora.py", "unet"): "a prefix that trainers give the denoiser of any family",
    ("eqxdiff/models/_lora.py", "transformer"): "a prefix that trainers give CLIP in any family",
    ("eqxdiff/sampling/spacing.py", "sd"): "the name that a published table has",
    ("eqxdiff/sampling/spacing.py", "sdxl"): "likewise",
    ("eqxdiff/tensors/flax.py", "transformer"): "lists of layers in Flax, which have numbers there",
}
"""File or folder, and a word that it may have, and why."""


def words_of_families() -> set[str]:
    """The names of the families of this package, of their models and of their components."""
    words = {"flux", "sd15", "sdxl", "unet", "transformer", "text_encoder"}
    for family in FAMILIES:
        words |= {family.name, *family.presets, *family.components}
    return words


def spoken(tree: ast.AST) -> list[str]:
    """The string constants of a file but for docstrings and the help of options."""
    silent = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(node.value)
        if isinstance(node, ast.keyword) and node.arg == "help":
            silent |= set(ast.walk(node.value))
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [c.value for c in constants if isinstance(c.value, str) and c not in silent]


def test_nothing_outside_the_families_names_one():
    words, found = words_of_families(), []
    inside = {path.parent for path in PACKAGE.glob("models/*/*.py")}
    assert {path.name for path in inside} == {"flux1", "flux2", "sd", "sdxl", "unet"}
    files = [path for path in PACKAGE.rglob("*.py") if path.parent not in inside]
    for path in [*files, *CLI.glob("*.py")]:
        name = path.relative_to(CLI.parent).as_posix()
        for text in spoken(ast.parse(path.read_text())):
            for word in words:
                if re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", text.lower()):
                    found.append((name, word, text))
    used = {key for key in ALLOWED for name, word, _ in found if is_allowed(key, name, word)}
    assert used == set(ALLOWED), "an exception that nothing needs"
    assert not [one for one in found if not any(is_allowed(key, one[0], one[1]) for key in ALLOWED)]


def is_allowed(key: tuple[str, str], name: str, word: str) -> bool:
    return name.startswith(key[0]) and word == key[1]


def test_the_scan_sees_a_name():
    """Also one within another, but not one that help or a docstring gives as an example."""
    code = '"""unet"""\nOption(help="flux-dev")\nx = f"{y}/text_encoder_2"\nz["lora_unet_"]\n'
    assert spoken(ast.parse(code)) == ["/text_encoder_2", "lora_unet_"]
