"""What a file holds is told from its header, for every layout at full size."""

import math
import types
from functools import cache

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import read_manifest
from test_single_files_sd import VAE, WIDTHS, clip_config, unet_config

from eqxdiff._errors import CheckpointError
from eqxdiff.checkpoint import Table, load_module, read
from eqxdiff.checkpoint.form import Form
from eqxdiff.convert import recognise as recognise_module
from eqxdiff.convert.recognise import claim, denoisers, describe, find_pieces, locate
from eqxdiff.models import FAMILIES, Component, Lookalikes, PublishedFiles, find_model
from eqxdiff.models.flux1 import TransformerConfig
from eqxdiff.tensors import AbstractTensorSource, InMemory, TensorInfo, dequantised
from eqxdiff.text import CLIPTextConfig, T5Config
from eqxdiff.vae import AutoencoderKLConfig


F32, F8 = np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
POSITIONS = {"text_model.embeddings.position_ids": (1, 77)}


class Header(AbstractTensorSource):
    """A file of which only the header is there."""

    def __init__(self, shapes, dtype=F32):
        self._tensors = {name: TensorInfo(tuple(shape), dtype) for name, shape in shapes.items()}

    @property
    def tensors(self):
        return self._tensors

    def read(self, name, index, out):
        raise AssertionError(f"{name} is read")


def under(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


NOISE = dict.fromkeys(
    ["alphas_cumprod", "betas", "posterior_variance", "log_one_minus_alphas_cumprod"], (1000,)
)
EMA = {
    "model_ema.decay": (),
    "model_ema.num_updates": (),
    "model_ema.diffusion_modelout2bias": (4,),
}


@cache
def whole(name):
    """The names and shapes of a file of a whole model, with what such files hold besides."""
    vae = under("first_stage_model", read_manifest("vae_sd_ldm"))
    clip = read_manifest("clip_l") | POSITIONS
    unet = lambda kind: under("model.diffusion_model", read_manifest(f"unet_{kind}_ldm"))
    bigg = read_manifest("clip_bigg_openclip")
    flux = read_manifest("flux1_dev_bfl")
    return {
        "sd15": unet("sd15") | vae | under("cond_stage_model.transformer", clip) | NOISE | EMA,
        "sd21": unet("sd2") | vae | NOISE
        | under("cond_stage_model.model", read_manifest("clip_h_openclip")),
        "sdxl": unet("sdxl") | vae
        | under("conditioner.embedders.0.transformer", clip)
        | under("conditioner.embedders.1.model", bigg)
        | {"denoiser.sigmas": (1000,)},
        "refiner": unet("refiner") | vae | under("conditioner.embedders.0.model", bigg),
        "flux-dev": under("model.diffusion_model", flux)
        | under("vae", read_manifest("vae_flux_ldm"))
        | under("text_encoders.clip_l.transformer", clip | {"text_projection.weight": (768, 768)})
        | under("text_encoders.t5xxl.transformer", read_manifest("t5_xxl"))
        | {"text_encoders.clip_l.logit_scale": (), "text_encoders.t5xxl.logit_scale": ()},
    }[name]  # fmt: skip


CLIP_L = CLIPTextConfig(768, 3072, 12, 12)
SD_VAE = AutoencoderKLConfig(block_out_channels=WIDTHS, latent_channels=4, **VAE)
CONFIGS = {
    "sd15": {"unet": unet_config("sd15"), "text_encoder": CLIP_L, "vae": SD_VAE},
    "sd21": {
        "unet": unet_config("sd2"),
        "text_encoder": clip_config(1024, 23, 16, projects=False),
        "vae": SD_VAE,
    },
    "sdxl": {
        "unet": unet_config("sdxl"),
        "text_encoder": CLIP_L,
        "text_encoder_2": clip_config(1280, 32, 20, projects=True),
        "vae": SD_VAE,
    },
    "flux-dev": {
        "transformer": TransformerConfig(guidance_embeds=True),
        "text_encoder": CLIP_L,
        "text_encoder_2": T5Config(4096, 64, 10240, 24, 64),
        "vae": AutoencoderKLConfig(
            **{"block_out_channels": WIDTHS, "latent_channels": 16, **VAE},
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    },
}


@cache
def wanted(model):
    """As `claim` takes it: the table and full-size skeleton of each component."""
    parts = find_model(model)[0].components
    configs = CONFIGS[model]
    return {name: (part.table, part.skeleton(configs[name])) for name, part in parts.items()}


TABLES = {
    "sd15": {"unet": "unet_ldm", "text_encoder": "clip", "vae": "vae_ldm"},
    "sd21": {"unet": "unet_ldm", "text_encoder": "clip_openclip", "vae": "vae_ldm"},
    "sdxl": {
        **{"unet": "unet_sgm", "text_encoder": "clip", "text_encoder_2": "clip_openclip"},
        "vae": "vae_ldm",
    },
    "flux-dev": {
        **{"transformer": "flux1_transformer_bfl", "text_encoder": "clip"},
        **{"text_encoder_2": "t5", "vae": "vae_ldm"},
    },
}


@pytest.mark.parametrize("model", TABLES)
def test_a_whole_file_is_used_completely(model):
    """Every tensor belongs to a component of the full-size model or is dropped by name."""
    found = claim(Header(whole(model)), wanted(model), "the file")
    assert {name: piece.table for name, piece in found.items()} == TABLES[model]
    kind = describe(Header(whole(model)))
    assert kind.models[0] == model
    layout = {name: (piece.table, piece.prefix) for name, piece in found.items()}
    assert layout == kind.layout


@pytest.mark.parametrize("model", TABLES)
def test_each_component_is_found_by_itself(model):
    for name, (table, skeleton) in wanted(model).items():
        tensors, key_table = locate(Header(whole(model)), table, skeleton)
        assert key_table.name == TABLES[model][name]
        assert 10 < len(tensors.tensors) < len(whole(model))


def test_the_refiner_is_known_and_not_supported():
    kind = describe(Header(whole("refiner")))
    assert (kind.summary, kind.models) == ("the refiner of Stable Diffusion XL", ())
    pieces, rest = find_pieces(whole("refiner"))
    assert {piece.table for piece in pieces} == {"unet_ldm", "clip_openclip", "vae_ldm"}
    assert rest == []


@pytest.mark.parametrize(
    ("manifest", "summary", "table"),
    [
        ("unet_sd15", "Stable Diffusion 1", "unet"),
        ("unet_sd2", "Stable Diffusion 2", "unet"),
        ("unet_sdxl", "Stable Diffusion XL", "unet"),
        ("unet_sdxl_ldm", "Stable Diffusion XL", "unet_sgm"),
        ("unet_sd15_ldm", "Stable Diffusion 1", "unet_ldm"),
        ("flux1_dev", "FLUX.1 [dev]", "flux1_transformer"),
        ("flux1_schnell", "FLUX.1 [schnell]", "flux1_transformer"),
        ("flux1_dev_bfl", "FLUX.1 [dev]", "flux1_transformer_bfl"),
        ("controlnet_sd15", "Stable Diffusion 1", "controlnet"),
        ("controlnet_sd15_ldm", "Stable Diffusion 1", "controlnet_ldm"),
        ("vae_sd", None, "vae"),
        ("vae_sd_ldm", None, "vae_ldm"),
        ("vae_flux_ldm", None, "vae_ldm"),
        ("clip_l", None, "clip"),
        ("clip_bigg", None, "clip"),
        ("clip_bigg_openclip", None, "clip_openclip"),
        ("t5_xxl", None, "t5"),
    ],
)
def test_a_component_alone_is_recognised(manifest, summary, table):
    """With whatever prefix."""
    for prefix in ("", "some.where"):
        shapes = read_manifest(manifest)
        shapes = under(prefix, shapes) if prefix else shapes
        (piece,), rest = find_pieces(shapes)
        assert (piece.table, piece.prefix, rest) == (table, prefix, [])
        kind = describe(Header(shapes))
        assert (kind and kind.summary) == summary


def test_text_encoders_are_read_without_text_model():
    short = {name.removeprefix("text_model."): s for name, s in read_manifest("clip_l").items()}
    (piece,), _ = find_pieces(short)
    assert (piece.table, piece.prefix) == ("clip", "")
    (piece,), _ = find_pieces(under("text_encoders.clip_l.transformer", short))
    assert piece.prefix == "text_encoders.clip_l.transformer"


def test_everything_wrong_with_a_file_is_in_one_message():
    shapes = dict(whole("sd15"))
    del shapes["model.diffusion_model.out.2.bias"]
    shapes["first_stage_model.encoder.conv_in.bias"] = (3,)
    shapes |= {"lora.up": (3,), "model.diffusion_model.extra": (1,)}
    with pytest.raises(CheckpointError) as error:
        claim(Header(shapes), wanted("sd15"), "x.safetensors")
    message = str(error.value)
    assert message.startswith("x.safetensors does not fit the model. It looks like Stable Diff")
    for line in (
        "missing: model.diffusion_model.out.2.bias",
        "left over: model.diffusion_model.extra",
        "first_stage_model.encoder.conv_in.bias is (3,), not (128,)",
        "left over: lora.up",
    ):
        assert line in message


def test_a_file_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match=r"It looks like Stable Diffusion XL"):
        claim(Header(whole("sdxl")), wanted("sd15"), "x")
    with pytest.raises(CheckpointError, match="none of the components"):
        claim(Header({"a": (1,)}), wanted("sd15"), "x")


def test_a_file_may_lack_components():
    alone = under("model.diffusion_model", read_manifest("flux1_dev_bfl"))
    assert set(claim(Header(alone), wanted("flux-dev"), "x")) == {"transformer"}
    alone = read_manifest("vae_flux_ldm")
    assert set(claim(Header(alone), wanted("flux-dev"), "x")) == {"vae"}


def test_a_family_brings_its_own_forms_and_tables(tmp_path, monkeypatch):
    """Its table may lie anywhere, and a file of it is told from those of all other families."""
    file = tmp_path / "toy.toml"
    file.write_text('[rename]\n"net" = "toy_net"')
    toy = Lookalikes("a toy", ("toy",), {"body": (file, "")})
    own = Component(dict, dict, (Form(file, ("toy_net.mark",)),), (), "denoiser")
    recognise = lambda kind, shapes: toy if kind == file and (7,) in shapes.values() else None
    files = PublishedFiles((toy,), recognise, leftovers=("dust",))
    family = types.SimpleNamespace(components={"body": own}, controlnet=None, files=files)
    shapes = {"a.toy_net.mark": (7,), "dust.x": (1,)}
    assert describe(Header(shapes)) is None
    monkeypatch.setattr(recognise_module, "families", lambda: (*FAMILIES, family))
    assert describe(Header(shapes)) is toy
    assert describe(Header(whole("sd15"))).models == ("sd15",)
    skeleton = {"net": {"mark": jax.ShapeDtypeStruct((7,), F32)}}
    (piece,) = claim(Header(shapes), {"body": (own.table, skeleton)}, "x").values()
    assert (piece.table, piece.prefix, piece.names) == (file, "a", ("a.toy_net.mark",))
    assert piece.key_table().name == "toy"
    assert denoisers() == ["transformer", "unet", "body"]


class Scales(Header):
    """Every number is one."""

    def read(self, name, index, out):
        out[...] = 1


@pytest.mark.parametrize(
    "names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")]
)
def test_a_scaled_file_is_used_completely(names):
    """The FLUX.1 of full size in float8, each matrix with its scales beside it."""
    flux = whole("flux-dev")
    matrices = [n for n, s in flux.items() if len(s) == 2 and n.startswith("model.")]
    scales = [f"{matrix.removesuffix('weight')}{name}" for matrix in matrices for name in names]
    file = Scales(flux, F8)
    file._tensors |= {name: TensorInfo((), F32) for name in scales}
    file._tensors["model.diffusion_model.scaled_fp8"] = TensorInfo((2,), F8)
    assert set(claim(file, wanted("flux-dev"), "x")) == set(TABLES["flux-dev"])
    assert describe(file).models == ("flux-dev",)


class TestScaled:
    """Weights in 8 bits times a scale."""

    @staticmethod
    def file(scale, suffix="scale_weight"):
        random = np.random.RandomState(0)
        head = "model.diffusion_model.double_blocks.0.img_mod.lin"
        return {
            f"{head}.weight": random.standard_normal((6, 4)).astype(F8),
            f"{head}.bias": random.standard_normal(6).astype(F32),
            f"{head}.{suffix}": np.asarray(scale, F32),
        }

    @pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
    @pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
    def test_they_are_multiplied_when_read(self, suffix, shape):
        scale = np.random.RandomState(1).uniform(0.1, 2, shape).astype(F32)
        file = self.file(scale, suffix)
        file["scaled_fp8"] = np.zeros(0, F8)
        file["model.diffusion_model.double_blocks.0.img_mod.lin.scale_input"] = np.ones((), F32)
        file["model.diffusion_model.double_blocks.0.img_mod.lin.comfy_quant"] = np.frombuffer(
            b'{"format": "float8_e4m3fn"}', np.uint8
        )
        tensors, _ = locate(InMemory(file), "flux1_transformer", {})
        name, bias, _ = list(file)[:3]
        assert set(tensors.tensors) == {name, bias}
        column = scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(())
        for box in (((0, 6), (0, 4)), ((2, 5), (1, 3)), ((3, 4), (0, 4))):
            out = np.empty([stop - start for start, stop in box], F32)
            tensors.read(name, box, out)
            whole = file[name].astype(F32) * column
            np.testing.assert_array_equal(out, whole[tuple(slice(*b) for b in box)])
        assert tensors.dtype == ml_dtypes.bfloat16
        assert tensors.tensors[bias].dtype == F32

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"x.scale_weight": np.ones((), F32)}, "which is missing"),
            ({"bias.scale_weight": 0, "bias.weight": np.ones(3, F32)}, "only float8"),
            ({"y.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8)}, "format nvfp4"),
            ({"y.comfy_quant": np.frombuffer(b"[" * 99, np.uint8)}, "names no format"),
            (
                {"b.scale_weight": np.ones((2, 2), F32), "b.weight": np.ones((6, 4), F8)},
                "one a row",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, change, words):
        file = self.file(2.0) | {name: np.asarray(value) for name, value in change.items()}
        with pytest.raises(CheckpointError, match=words):
            locate(InMemory(file), "flux1_transformer", {})

    def test_a_module_is_loaded_from_them_in_any_dtype(self):
        name = "double_blocks.0.img_mod.lin"
        skeleton = {"lin": {"weight": jax.ShapeDtypeStruct((6, 4), F32)}}
        file = self.file(0.3)
        head = f"model.diffusion_model.{name}"
        del file[f"{head}.bias"]
        table = Table.parse(f'[rename]\n"lin" = "{head}"')
        tensors, _ = locate(InMemory(file), "flux1_transformer", {})
        wide = load_module(tensors, table, skeleton, dtype=F32)["lin"]["weight"]
        want = file[f"{head}.weight"].astype(F32) * np.float32(0.3)
        np.testing.assert_array_equal(wide, want)
        narrow = load_module(tensors, table, skeleton, dtype=tensors.dtype)["lin"]["weight"]
        np.testing.assert_array_equal(narrow, want.astype(ml_dtypes.bfloat16))

    def test_each_part_of_a_tensor_has_the_scales_of_its_own_rows(self, monkeypatch):
        """Cut into leaves, and each leaf read in pieces of two rows."""
        monkeypatch.setattr(read, "CHUNK_BYTES", 32)
        random = np.random.RandomState(0)
        weight = random.standard_normal((12, 4)).astype(F8)
        scale = random.uniform(0.1, 2, 12).astype(F32)
        file = InMemory({"ab.weight": weight, "ab.weight_scale": scale})
        table = Table.parse('[split]\n"ab" = ["a", "b"]')
        leaf = lambda rows: {"weight": jax.ShapeDtypeStruct((rows, 4), F32)}
        module = load_module(dequantised(file), table, {"a": leaf(7), "b": leaf(5)})
        want = weight.astype(F32) * scale[:, None]
        np.testing.assert_array_equal(module["a"]["weight"], want[:7])
        np.testing.assert_array_equal(module["b"]["weight"], want[7:])


def test_the_sizes_are_those_of_the_published_files():
    """Parameters of whole files, so that the manifests above are not too small."""
    count = lambda name: sum(math.prod(shape) for shape in whole(name).values())
    assert 1.06e9 < count("sd15") < 1.07e9
    assert 3.46e9 < count("sdxl") < 3.48e9
    assert 17.0e9 < count("flux-dev") < 17.1e9
