"""Meshes of fake devices: the same pictures, and only the transfers that need to be."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled_fast, relative_error, write_checkpoint
from jax.sharding import NamedSharding, PartitionSpec as P
from lora_files import Draft
from picture_files import make_picture
from sd_files import write_controlnet

import eqxdiff
from eqxdiff import ControlImage
from eqxdiff.pipeline import initial_noise
from eqxdiff.pipeline.batch import stack_examples
from eqxdiff.pipeline.sample import start_loop, step_batch
from eqxdiff.sharding import (
    check_batch,
    check_picture,
    make_mesh,
    on_mesh,
    parse_mesh,
)
from eqxdiff.vae import AutoencoderKL, AutoencoderKLConfig


SMALL = {"height": 64, "width": 64, "steps": 2}
FLUX, SD = {**SMALL, "max_sequence_length": 16}, {**SMALL, "guidance": 5.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, names = tmp_path_factory.mktemp("models"), ("flux-dev", "sdxl", "sd21")
    made = {name: str(write_checkpoint(root / name, name)) for name in names}
    return {**made, "controlnet": str(write_controlnet(root / "controlnet_0", "sd21"))}


def flux_lora():
    draft = Draft("flux-dev")
    for layer in ("proj_mlp", "proj_out", "attn.to_q"):
        name = f"single_transformer_blocks.0.{layer}"
        draft.lora(f"transformer.{name}", f"transformer:{name}", style="peft")
    return draft.adapter()


def control(number):
    return ControlImage(make_picture(number, 64, 64), 0.7)


PICTURES = {  # the model, how it is loaded, its settings, and meshes of 2, 4 and 8 devices
    "flux-dev": ("flux-dev", {}, FLUX, ["context=2"]),
    "flux-dev with a LoRA at run time": ("flux-dev", "lora", FLUX, ["fsdp=2,context=2,tensor=2"]),
    "flux-dev from a picture": ("flux-dev", "image", FLUX, ["data=2,context=2"]),
    "sdxl": ("sdxl", {}, SD, ["cfg=2,tensor=2"]),
    "sd21 with a ControlNet": ("sd21", "control", SD, ["data=2,cfg=2,fsdp=2"]),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_mesh_changes_no_picture(folders, case):
    name, kind, settings, meshes = PICTURES[case]
    more, given = {}, dict(settings)
    if kind == "lora":
        more = {"loras": [flux_lora()], "lora_mode": "runtime"}
    if kind == "control":
        more, given["controls"] = {"controlnets": [folders["controlnet"]]}, [control(1)]
    if kind == "image":
        given |= {"image": make_picture(2, 64, 64), "strength": 0.5}
    with compiled_fast():
        one = eqxdiff.load(name, folders[name], **more)
        wanted = eqxdiff.generate(one, "a cat", seed=3, **given)
        noise = np.asarray(eqxdiff.prepare(one, "a cat", seed=3, **given).noise)
        for text in meshes:
            mesh = parse_mesh(text)
            pipe = eqxdiff.load(name, folders[name], mesh=mesh, **more)
            count = mesh.shape["data"] * mesh.shape["fsdp"]
            made = eqxdiff.generate(pipe, "a cat", seed=3, batch_size=count, **given)
            assert relative_error(made.latents, wanted.latents) < 2e-5
            assert relative_error(made.arrays, wanted.arrays) < 2e-5
            example = eqxdiff.prepare(pipe, "a cat", seed=3, **given)
            assert np.array_equal(np.asarray(example.noise), noise)


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(text):
    """The kind, the shapes of the results, and whether it is in a scan, of each transfer."""
    found = []
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            shapes = [
                tuple(int(n) for n in shape.split(",") if n)
                for shape in re.findall(r"\w+\[([\d,]*)\]", match[1])
            ]
            found.append((match[2], shapes, "while/body" in line))
    return found


@pytest.fixture(scope="module")
def flux_step(folders):
    """Compiles one step of FLUX.1 on a mesh."""
    pipe = eqxdiff.load("flux-dev", folders["flux-dev"])
    encoded = pipe.encode("a cat", **FLUX)

    def compile(text):
        mesh = parse_mesh(text)
        spread = eqxdiff.open_model("flux-dev", folders["flux-dev"], mesh=mesh)
        modules = spread.load(spread.names("denoiser"))
        count = mesh.shape["data"] * mesh.shape["fsdp"]
        one = eqxdiff.prepare(pipe, eqxdiff.Request.make(encoded, **FLUX))
        batch = stack_examples([one] * count, count)
        started = start_loop(spread, modules, batch)
        lowered = step_batch.lower((started.loop, jnp.asarray(0)), started.x, started.state)
        return modules["transformer"], collectives(lowered.compile().compiled.as_text())

    return compile


def test_pictures_over_data_need_no_transfers(flux_step):
    assert flux_step("data=8")[1] == []


def test_fsdp_gathers_one_layer_at_a_time(flux_step):
    """Within the scan there are gathers of one layer's weights and nothing else; what the
    modulations of all blocks need is one sum before it."""
    transformer, found = flux_step("fsdp=8")
    blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
    layers = {tuple(x.shape[1:]) for x in jax.tree.leaves(blocks) if x.ndim == 3}
    inside = [(kind, shapes) for kind, shapes, within in found if within]
    assert len(inside) >= 17
    assert {kind for kind, _ in inside} == {"all-gather"}
    for _, shapes in inside:
        assert all(shape in layers or shape[::-1] in layers for shape in shapes)
    outside = [(kind, shapes) for kind, shapes, within in found if not within]
    assert sum(kind == "all-reduce" for kind, _ in outside) <= 1
    assert all(len(shape) <= 3 for _, shapes in outside for shape in shapes)
    gathered = [shape for kind, shapes in outside if kind == "all-gather" for shape in shapes]
    assert max(np.prod(shape) for shape in gathered) <= 8 * 256  # vectors and the first layers


def test_tensor_gathers_neither_weights_nor_heads(flux_step):
    found = flux_step("tensor=4")[1]
    kinds = [kind for kind, _, _ in found]
    assert "all-gather" not in kinds
    sums = [shape for kind, shapes, _ in found if kind == "all-reduce" for shape in shapes]
    assert len(sums) == 5  # of attention and MLP, image and text; and of the single block


def test_context_exchanges_heads_and_nothing_else(flux_step):
    found = flux_step("context=4")[1]
    inside = [kind for kind, _, within in found if within]
    assert inside == ["all-to-all"] * 8  # q, k, v and the result, in each kind of block


def test_the_autoencoder_is_split_by_rows():
    """Each device has its rows and a halo: a share of the memory, and the same numbers."""
    cfg = AutoencoderKLConfig((8, 8, 8, 16), latent_channels=4, norm_num_groups=4)
    vae, mesh = AutoencoderKL.init(cfg, key=jax.random.key(0)), make_mesh(context=8)
    image = np.sin(np.arange(128 * 96 * 3, dtype=np.float32) / 99).reshape(128, 96, 3)

    def both(spread, vae, image):
        with on_mesh(mesh if spread else None):
            latent = vae.normalize(vae.encode(image).mean)
            return latent, vae.decode(latent)

    memory, made = {}, {}
    for spread in (False, True):
        place = NamedSharding(mesh, P()) if spread else jax.devices()[0]
        arrays = jax.device_put((vae, image), place)
        with compiled_fast():
            program = jax.jit(both, static_argnums=0).lower(spread, *arrays).compile()
        memory[spread] = program.memory_analysis().temp_size_in_bytes
        made[spread] = program(*arrays)
        found = collectives(program.as_text())
    assert relative_error(made[True][0], made[False][0]) < 5e-6
    assert relative_error(made[True][1], made[False][1]) < 2e-5
    assert memory[True] < memory[False] / 3
    kinds = {kind for kind, _, _ in found}
    assert {"collective-permute", "all-reduce"} <= kinds  # halos, statistics
    gathered = [s for kind, shapes, _ in found if kind == "all-gather" for s in shapes]
    assert all(np.prod(shape) <= 128 * 96 * 3 for shape in gathered)  # at most the picture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=0", "`mesh` data=0 is not understood"),
        (
            "data=3,fsdp=-1",
            "data 3 does not divide 8 devices, so that fsdp -1 has no size: use 1, 2, 4 or 8.",
        ),
        ("data=-1,fsdp=-1", "data and fsdp are both -1"),
        ("context=16", "A mesh of 16 devices needs more than the 8 here."),
        ("rows=2", "of some of cfg, data, fsdp, context, tensor"),
        ("auto", "`mesh` auto cannot be chosen here"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(eqxdiff.SettingError, match=re.escape(message)):
        parse_mesh(text)


def test_the_rest_of_the_devices_and_a_mesh_of_ones_own():
    assert dict(parse_mesh("fsdp=2,data=-1").shape) == {
        "data": 4, "cfg": 1, "fsdp": 2, "context": 1, "tensor": 1,
    }  # fmt: skip
    assert parse_mesh("auto", lambda: make_mesh(tensor=2)).shape["tensor"] == 2
    with pytest.raises(eqxdiff.SettingError, match="`tensor` 0 is out of range"):
        make_mesh(tensor=0)


def test_what_a_mesh_does_not_divide_says_what_would(folders):
    with pytest.raises(
        eqxdiff.SettingError, match="tensor=7 divides no weight of transformer: use 1, 2, 4"
    ):
        eqxdiff.open_model("flux-dev", folders["flux-dev"], mesh=make_mesh(tensor=7))
    with pytest.raises(eqxdiff.SettingError, match=r"of 4, over which .*: use 4 or 8"):
        check_batch(make_mesh(data=2, fsdp=2), 6)
    with pytest.raises(
        eqxdiff.SettingError, match=r"context=8 does not divide the 100 rows .*: use 1, 2, 4 or 5"
    ):
        check_picture(make_mesh(context=8), 100, ("prompt",))
    with pytest.raises(
        eqxdiff.SettingError, match=r"cfg=2 does not divide the 1 .* \(prompt\): use 1\."
    ):
        check_picture(make_mesh(cfg=2), 64, ("prompt",))


def test_each_device_is_given_its_own_shards(folders):
    """The text encoders are split, too, and each weight is read shard by shard."""
    pipe = eqxdiff.load("flux-dev", folders["flux-dev"], mesh=make_mesh(fsdp=4, tensor=2))
    t5 = pipe.components["text_encoder_2"]
    assert t5.block.attention.q.weight.sharding.spec == P(None, "tensor", "fsdp")
    held: dict = {}
    arrays = jax.tree.leaves(eqx.filter(pipe.components, eqx.is_array))
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    total = sum(array.nbytes for array in arrays)
    assert max(held.values()) < total / 3
    assert np.array_equal(initial_noise([3], (4, 8, 8)), initial_noise([3, 4], (4, 8, 8))[:1])
