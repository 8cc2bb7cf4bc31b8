"""Pickles and Flax: tensors are read, nothing is run, and what is damaged is one clear error."""

import io
import json
import os
import pickle
import random
import shutil
import tracemalloc
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from command import cli as cli

from eqxdiff._errors import CheckpointError, SourceError
from eqxdiff.hub import open_source
from eqxdiff.tensors import open_tensors
from eqxdiff.tensors.flax import open_flax
from eqxdiff.tensors.pickles import open_pickle


pytest_plugins = ["whole_files"]
DTYPES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


class Global:
    """Pickled as the name of something in a module that need not exist."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of a global."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce_ex__(self, protocol):
        return self.function, self.args


class Pickler(pickle._Pickler):
    """Writes what PyTorch writes, without it."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages: list[bytes] = []

    def persistent_id(self, obj):
        if isinstance(obj, np.ndarray):
            self.storages.append(obj.tobytes())
            kind = Global("torch", DTYPES[str(obj.dtype)])
            return ("storage", kind, str(len(self.storages) - 1), "cpu", obj.size)
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            return
        super().save(obj, save_persistent_id)

    def save_reduce(self, func, args, *rest, obj=None, **more):
        if isinstance(func, Global):
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
            return
        super().save_reduce(func, args, *rest, obj=obj, **more)


def torch_file(path, tree, *, compression=zipfile.ZIP_STORED, pkl=None, drop=()):
    """Arrays in `tree` become tensors; a tuple `(array, start, shape, strides)` is a view."""

    def tensor(value):
        if isinstance(value, dict):
            return {key: tensor(item) for key, item in value.items()}
        if isinstance(value, np.ndarray):
            strides = [s // value.itemsize for s in np.zeros(value.shape, value.dtype).strides]
            value = (value, 0, value.shape, tuple(strides))
        if isinstance(value, tuple) and isinstance(value[0], np.ndarray):
            rebuild = Global("torch._utils", "_rebuild_tensor_v2")
            return Call(rebuild, *value, False, Call(Global("collections", "OrderedDict")))
        return value

    data = io.BytesIO()
    pickler = Pickler(data)
    pickler.dump(tensor(tree))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data.getvalue() if pkl is None else pkl)
        archive.writestr("archive/byteorder", "little")
        for key, storage in enumerate(pickler.storages):
            if key not in drop:
                archive.writestr(f"archive/data/{key}", storage)
        archive.writestr("archive/version", "3\n")
    return path


def everything(source):
    result = {}
    for name, info in source.tensors.items():
        result[name] = np.empty(info.shape, info.dtype)
        source.read(name, tuple((0, size) for size in info.shape), result[name])
    return result


A = np.arange(6, dtype=np.float32).reshape(2, 3)
TREE = {"a.weight": A, "b": np.arange(4, dtype=np.float16), "step": 7, "n": np.array(3)}


def test_the_tensors_of_a_pickle_are_read(tmp_path):
    tensors = everything(open_pickle(torch_file(tmp_path / "x.ckpt", TREE)))
    assert set(tensors) == {"a.weight", "b", "n"}
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, TREE[name])
        assert array.dtype == TREE[name].dtype


def test_what_training_leaves_besides_is_passed_over(tmp_path):
    """A checkpoint of PyTorch Lightning, as Stable Diffusion 1 was published."""
    callback = Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    scalar = Call(Global("numpy.core.multiarray", "scalar"), b"x")
    tree = {"state_dict": TREE, "callbacks": {callback: {"best": scalar}}, "epoch": 3}
    tensors = everything(open_pickle(torch_file(tmp_path / "x.ckpt", tree)))
    assert set(tensors) == {"a.weight", "b", "n"}


def test_views_in_another_order_are_read(tmp_path):
    tree = {
        "t": (A, 0, (3, 2), (1, 3)),
        "row": (A, 3, (3,), (1,)),
        "one": (A, 0, (2, 1, 3), (3, 9, 1)),
    }
    source = open_pickle(torch_file(tmp_path / "x.pt", tree))
    tensors = everything(source)
    np.testing.assert_array_equal(tensors["t"], A.T)
    np.testing.assert_array_equal(tensors["row"], A[1])
    np.testing.assert_array_equal(tensors["one"], A[:, None])
    part = np.empty((2, 1), np.float32)
    source.read("t", ((1, 3), (1, 2)), part)
    np.testing.assert_array_equal(part, A.T[1:, 1:])


def test_the_reference_library_agrees(tmp_path):
    """Where it is installed."""
    torch = pytest.importorskip("torch")
    tensors = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "t": torch.randn(2, 3).T,
        "p": torch.nn.Parameter(torch.randn(2)),
    }
    torch.save({"state_dict": tensors, "global_step": 3}, tmp_path / "x.ckpt")
    for name, array in everything(open_pickle(tmp_path / "x.ckpt")).items():
        want = tensors[name].detach().float().numpy()
        np.testing.assert_array_equal(array.astype(np.float32), want)


RAN = []


@pytest.mark.parametrize(
    ("pkl", "words"),
    [
        (b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.", "asks for os.system"),
        (b"cbuiltins\neval\n(S'1/0'\ntR.", "asks for builtins.eval"),
        (b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.", "asks for builtins.getattr"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "asks for posix.system"),
        (b"ctorch\nload\n(S'x'\ntR.", "asks for torch.load"),
        (b"ctorch._utils\n_rebuild_tensor\n(tR.", "_rebuild_tensor, which is no tensor"),
        (b"ctorch.nn\nModule\n)\x81.", "asks for torch.nn.Module"),
        (b"\x80\x02\x82\x01.", "its pickle is not valid|extension"),
        (b"\x80\x02(S'module'\nS'x'\ntQ.", "described in an unknown way"),
        (b"\x80\x02]q\xff.", "no dictionary of tensors"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "no dictionary of tensors"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "not valid"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not valid"),
        (b"\x80\x05\x96\xff\xff\xff\xff\x07\x00\x00\x00.", "not valid"),
        (b"(" * 100_000 + b".", "not valid|no dictionary"),
        (b"", "not valid"),
        (b".", "not valid"),
        (b"\x80\x02}.", "no dictionary of tensors"),
        (pickle.dumps({"a": 1}), "no dictionary of tensors"),
    ],
)
def test_a_pickle_bomb_is_refused_and_nothing_is_run(tmp_path, monkeypatch, pkl, words):
    monkeypatch.setattr(os, "system", lambda *_: RAN.append("system"))
    path = torch_file(tmp_path / "x.ckpt", {}, pkl=pkl)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=words) as error:
        open_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * path.stat().st_size + 10**6
    assert len(str(error.value)) < 400
    assert RAN == []


@pytest.mark.parametrize(
    ("tree", "more", "words"),
    [
        ({"a": (A, 0, (2, 3), (4, 1))}, {}, "a view with gaps"),
        ({"a": (A, 0, (2**20, 2**20), (0, 0))}, {}, "larger than the file"),
        ({"a": (A, 3, (2, 3), (3, 1))}, {}, "beyond the end of its numbers"),
        ({"a": (A, 0, (-2, 3), (3, 1))}, {}, "described in an unknown way"),
        ({"a": A}, {"drop": (0,)}, "the numbers of a are missing"),
        ({"a\x1b": A}, {}, "cannot be printed"),
        ({"a": np.zeros((100, 100), np.float32)}, {"compression": 8}, "is compressed"),
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path, tree, more, words):
    with pytest.raises(CheckpointError, match=words):
        open_pickle(torch_file(tmp_path / "x.ckpt", tree, **more))


def test_what_is_no_archive_is_refused(tmp_path):
    for content, words in (
        (b"\x80\x02\x8a\x0al\xfc", "no zip archive"),
        (b"PK\x03\x04" + bytes(99), "no zip archive"),
        (b"", "no zip archive"),
    ):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            open_pickle(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="it is a PyTorch pickle"):
        open_tensors(torch_file(tmp_path / "y.ckpt", TREE))


def mutated(content, pick):
    content = bytearray(content)
    for _ in range(pick.choice([1, 1, 2, 6])):
        at = pick.randrange(len(content))
        kind = pick.randrange(4)
        if kind == 0:
            content[at] = pick.randrange(256)
        elif kind == 1:
            del content[at : at + pick.choice([1, 4, 40])]
        elif kind == 2:
            content[at:at] = pick.randbytes(pick.choice([1, 4]))
        else:
            content[at : at + 4] = pick.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        content = content or bytearray(b"x")
    return bytes(content)


@pytest.mark.parametrize("kind", ["archive", "pickle", "flax"])
def test_mutated_files_give_a_clear_error_or_load(tmp_path, kind):
    path = tmp_path / "x"
    tree = {"state_dict": {"a.weight": A, "b": np.ones(3, np.float16)}, "step": 7}
    if kind == "flax":
        good, opener = pack(FLAX), open_flax
    else:
        good, opener = torch_file(path, tree).read_bytes(), open_pickle
    pkl = zipfile.ZipFile(path).read("archive/data.pkl") if kind == "pickle" else b""
    loaded = 0
    for seed in range(500):
        pick = random.Random(seed)
        if kind == "pickle":
            torch_file(path, tree, pkl=mutated(pkl, pick))
        else:
            path.write_bytes(mutated(good, pick))
        message = None
        try:
            everything(opener(path))
        except CheckpointError as error:
            message = str(error)
        except BaseException:
            print(f"seed {seed}")
            raise
        loaded += message is None
        assert len((message or "").encode()) < 600
    assert 1 < loaded < 450


def pack(value):
    """msgpack, with arrays as Flax writes them; no more of the format than that takes."""
    if isinstance(value, dict):
        items = b"".join(pack(key) + pack(item) for key, item in value.items())
        return b"\xde" + len(value).to_bytes(2, "big") + items
    if isinstance(value, str):
        return b"\xd9" + bytes([len(value.encode())]) + value.encode()
    if isinstance(value, bool) or value is None:
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return bytes([value]) if value < 128 else b"\xcf" + value.to_bytes(8, "big")
    if isinstance(value, tuple):
        return bytes([0x90 + len(value)]) + b"".join(map(pack, value))
    if isinstance(value, bytes):
        return b"\xc6" + len(value).to_bytes(4, "big") + value
    inner = pack((value.shape, str(value.dtype), value.tobytes()))
    return b"\xc9" + len(inner).to_bytes(4, "big") + b"\x01" + inner


KERNEL = np.arange(2 * 2 * 3 * 5, dtype=np.float32).reshape(2, 2, 3, 5)
FLAX = {
    "conv_in": {"kernel": KERNEL, "bias": np.ones(5, np.float32)},
    "down_blocks_0": {"attentions_1": {"to_out_0": {"kernel": A}, "norm": {"scale": A[0]}}},
    "time_embedding": {"linear_1": {"kernel": A.astype(ml_dtypes.bfloat16)}},
    "text_model": {"layers": {"0": {"embedding": A}}},
}


def test_flax_is_read_as_pytorch_names_it(tmp_path):
    (tmp_path / "x.msgpack").write_bytes(pack(FLAX))
    tensors = everything(open_tensors(tmp_path / "x.msgpack"))
    assert set(tensors) == {
        "conv_in.weight",
        "conv_in.bias",
        "down_blocks.0.attentions.1.to_out.0.weight",
        "down_blocks.0.attentions.1.norm.weight",
        "time_embedding.linear_1.weight",
        "text_model.layers.0.weight",
    }
    np.testing.assert_array_equal(tensors["conv_in.weight"], KERNEL.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(tensors["down_blocks.0.attentions.1.to_out.0.weight"], A.T)
    np.testing.assert_array_equal(tensors["text_model.layers.0.weight"], A)
    assert tensors["time_embedding.linear_1.weight"].dtype == ml_dtypes.bfloat16


def test_the_writing_library_agrees(tmp_path):
    """Where it is installed."""
    msgpack = pytest.importorskip("msgpack")

    def array(value):
        inner = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1, inner)

    content = msgpack.packb(jax.tree.map(array, FLAX), strict_types=True)
    (tmp_path / "x.msgpack").write_bytes(content)
    (tmp_path / "y.msgpack").write_bytes(pack(FLAX))
    one, two = (everything(open_flax(tmp_path / f"{n}.msgpack")) for n in "xy")
    assert set(one) == set(two)
    for name, value in one.items():
        assert value.tobytes() == two[name].tobytes()


def raw_array(shape, dtype, data):
    inner = pack((shape, dtype, data))
    return b"\xc9" + len(inner).to_bytes(4, "big") + b"\x01" + inner


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pack(FLAX)[:-1], "truncated"),
        (pack(FLAX) + b"x", "1 bytes follow"),
        (b"\x81" * 10**5, "key that is no text|nested too deeply"),
        (b"\x81\xa1a" * 1000, "nested too deeply"),
        (b"\xdf\xff\xff\xff\xff\xa1a\xc0", "truncated"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "truncated"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "truncated"),
        (b"\x81\xa1a\xdb\xff\xff\xff\xff", "name that is too long"),
        (b"\x82\xa1a\xc0\xa1a\xc0", "is there twice"),
        (b"\x81\xa1a\xc1", "unknown code"),
        (b"\x81\xa1a\xc0", "holds no arrays"),
        (b"\x81\xa4bias" + raw_array((2**40,), "float32", b""), "do not agree"),
        (b"\x81\xa4bias" + raw_array((2,), "float32", b"1234"), "do not agree"),
        (b"\x81\xa4bias" + raw_array((1,), "object", b"1234"), "unknown shape or dtype object"),
        (b"\x81\xa4\xff\xff\xff\xff\xc0", "no text"),
        (b"\x81\xa3odd" + raw_array((1,), "float32", b"1234"), "odd is of an unknown kind"),
        (b"\x81\xb9__msgpack_chunked_array__\xc3", "in chunks"),
    ],
)  # fmt: skip
def test_a_damaged_flax_file_is_refused(tmp_path, content, words):
    path = tmp_path / "x.msgpack"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=words):
        open_flax(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(content) + 10**6


NUMBERED = {"down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "net"}
NUMBERED |= {"downsamplers", "upsamplers", "to_out"}


def flax_tree(tensors):
    """What Flax makes of PyTorch's names, by the rules of the scripts that converted them."""
    tree: dict = {}
    for name, array in tensors.items():
        parts: list[str] = []
        for part in name.split("."):
            if part.isdigit() and parts and parts[-1] in NUMBERED:
                parts[-1] += f"_{part}"
            else:
                parts.append(part)
        *parents, last = parts
        if last == "weight" and "embedding" in parents[-1] and "time" not in name:
            last = "embedding"
        elif last == "weight" and array.ndim == 1:
            last = "scale"
        elif last == "weight":
            last = "kernel"
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = np.ascontiguousarray(array)
    return tree


@pytest.mark.parametrize("checkpoint", ["sd15", "sdxl"], indirect=True)
def test_a_flax_folder_is_converted(checkpoint, cli, tmp_path):
    """Names, axes and configs, back to the folder that it came from."""
    model, folder = checkpoint
    shutil.copytree(folder / "base", tmp_path / "flax")
    for file in (tmp_path / "flax").glob("*/*.safetensors"):
        name = "flax_model" if file.name == "model.safetensors" else "diffusion_flax_model"
        tree = flax_tree(safetensors.numpy.load_file(file))
        file.with_name(f"{name}.msgpack").write_bytes(pack(tree))
        file.unlink()
    for file in (tmp_path / "flax").rglob("*.json"):
        if file.name in ("config.json", "model_index.json", "scheduler_config.json"):
            text = file.read_text()
            for cls in ("UNet2DConditionModel", "AutoencoderKL", "StableDiffusion", "PNDMSch"):
                text = text.replace(f'"{cls}', f'"Flax{cls}')
            file.write_text(text)
    outcome = cli("convert", tmp_path / "flax", tmp_path / "y", "--model", model, "--quiet")
    assert outcome.status == 0, outcome.err
    for file in (folder / "base").glob("*/*.safetensors"):
        want = safetensors.numpy.load_file(file)
        got = safetensors.numpy.load_file(tmp_path / "y" / file.relative_to(folder / "base"))
        assert set(got) == set(want)
        for name, array in want.items():
            assert got[name].tobytes() == array.tobytes(), name
    index = json.loads((tmp_path / "y" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    with pytest.raises(SourceError, match=r"only for Flax .*`eqxdiff convert` makes"):
        open_source(tmp_path / "flax").tensors("unet")


@pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)
def test_a_pickle_is_converted_only_when_asked_to(checkpoint, cli, tmp_path, hub):
    model, folder = checkpoint
    tensors = safetensors.numpy.load_file(folder / "all.safetensors")
    file = torch_file(tmp_path / "x.ckpt", {"state_dict": dict(tensors), "epoch": 1})
    argv = ("convert", file, tmp_path / "y", "--model", model, "--quiet")
    refused = cli(*argv)
    assert "is a pickle, which can run any code when it is opened" in refused.error
    assert "--pickle" in refused.error
    outcome = cli(*argv, "--pickle")
    assert outcome.status == 0, outcome.err
    want = safetensors.numpy.load_file(next((folder / "base" / "vae").glob("*.safetensors")))
    got = safetensors.numpy.load_file(next((tmp_path / "y" / "vae").glob("*.safetensors")))
    for name, array in want.items():
        assert got[name].tobytes() == array.tobytes()
