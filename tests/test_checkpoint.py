"""From a file to a module and back: dtypes, placement, bad numbers, and files that appear whole."""

import errno
import json
import os
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from eqxdiff._errors import CheckpointError
from eqxdiff.checkpoint import FILE, Table, export_tensors, load_module, read, save_module
from eqxdiff.nn import Linear, stack
from eqxdiff.tensors import AbstractTensorSource, InMemory, SafetensorsFile


TABLE = Table.parse("""
stack = ["blocks"]
[rename]
"proj_in" = "img_in"
[split]
"blocks.*.qk" = ["blocks.*.to_q", "blocks.*.to_k"]
"mod" = ["norm[2/2]", "norm[1/2]"]
[transpose]
".proj.weight" = [1, 0]
[reshape]
"proj_in.weight" = [0, 0, 1]
""")


class Block(eqx.Module):
    to_q: Linear
    to_k: Linear
    proj: Linear


class Net(eqx.Module):
    proj_in: Linear
    blocks: Block
    norm: Linear

    @classmethod
    def init(cls, dtype=jnp.float32):
        linear = lambda i, o, key: Linear.init(i, o, key=key, dtype=dtype)
        key = jax.random.key(0)
        block = lambda key: Block(linear(8, 16, key), linear(8, 8, key), linear(16, 8, key))
        return cls(linear(8, 8, key), stack(block, 3, key=key), linear(8, 32, key))


def skeleton(dtype=jnp.float32):
    return eqx.filter_eval_shape(lambda: Net.init(dtype))


@pytest.fixture(scope="module")
def net():
    random = np.random.RandomState(0)
    make = lambda leaf: jnp.asarray(random.standard_normal(leaf.shape).astype(np.float32))
    return jax.tree.map(make, skeleton())


def assert_equal(module, wanted):
    assert jax.tree.structure(module) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, module, wanted)


@pytest.fixture
def small_chunks(monkeypatch):
    """Pieces of two rows, so that small tensors are cut too."""
    monkeypatch.setattr(read, "CHUNK_BYTES", 100)


def file_of(net, dtype=np.float32):
    return {name: np.asarray(array, dtype) for name, array in export_tensors(net, TABLE)}


@pytest.mark.usefixtures("small_chunks")
def test_a_saved_module_is_loaded_bit_for_bit(tmp_path, net):
    (path,) = save_module(net, TABLE, tmp_path / "new" / "folder")
    assert path.name == "diffusion_pytorch_model.safetensors"
    assert_equal(load_module(SafetensorsFile(path), TABLE, skeleton()), net)


def test_the_reference_library_reads_what_is_saved(tmp_path, net):
    (path,) = save_module(net, TABLE, tmp_path, stem="model", metadata={"made": "ü"})
    wanted = file_of(net)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "made": "ü"}
        assert set(file.keys()) == set(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
    assert path.name == "model.safetensors"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.usefixtures("small_chunks")
def test_each_tensor_is_cast_on_the_way(net, dtype):
    """As a cast of the whole, and to the skeleton's own dtype where none is asked for."""
    file = file_of(net)
    for module in (
        load_module(InMemory(file), TABLE, skeleton(), dtype=dtype),
        load_module(InMemory(file), TABLE, skeleton(dtype)),
    ):
        for leaf, wanted in zip(jax.tree.leaves(module), jax.tree.leaves(net), strict=True):
            assert leaf.dtype == dtype
            np.testing.assert_array_equal(leaf, np.asarray(wanted).astype(dtype))


def test_integers_keep_their_dtype():
    table = Table.parse("")
    want = {"ids": jax.ShapeDtypeStruct((3,), jnp.int32)}
    module = load_module(InMemory({"ids": np.arange(3)}), table, want, dtype=jnp.bfloat16)
    assert module["ids"].dtype == jnp.int32
    with pytest.raises(CheckpointError, match="ids holds float32 numbers where"):
        load_module(InMemory({"ids": np.ones(3, np.float32)}), table, want)


WITH_INFINITY = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in WITH_INFINITY for value in (np.nan, -np.nan, np.inf, -np.inf)]
    + [(ml_dtypes.float8_e4m3fn, value) for value in (np.nan, -np.nan)],
)
@pytest.mark.usefixtures("small_chunks")
def test_a_value_that_is_not_finite_is_refused(net, dtype, value):
    file = file_of(net, dtype)
    load_module(InMemory(file), TABLE, skeleton())
    file["blocks.1.proj.bias"][-1] = value
    with pytest.raises(CheckpointError, match=r"vae: blocks.1.proj.bias holds a value that is not"):
        load_module(InMemory(file), TABLE, skeleton(), name="vae")


def test_the_largest_finite_value_is_no_error(net):
    for dtype in (*WITH_INFINITY[1:], ml_dtypes.float8_e4m3fn):
        file = file_of(net, dtype)
        largest = ml_dtypes.finfo(dtype).max
        file["img_in.bias"][0], file["img_in.bias"][1] = largest, -largest
        module = load_module(InMemory(file), TABLE, skeleton())
        assert float(module.proj_in.bias[0]) == float(largest)


def test_a_value_too_large_for_the_wanted_dtype_is_refused(net):
    file = file_of(net)
    file["img_in.bias"][0] = 1e6
    with pytest.raises(CheckpointError, match=r"img_in.bias holds a value too large for float16"):
        load_module(InMemory(file), TABLE, skeleton(), dtype=np.float16)


@pytest.mark.parametrize(
    ("source", "value", "dtype"),
    [
        (ml_dtypes.bfloat16, 1e30, np.float16),
        (ml_dtypes.float8_e5m2, 57344.0, ml_dtypes.float8_e4m3fn),
        (np.float32, 3.4e38, ml_dtypes.bfloat16),
        (np.float16, 65000.0, ml_dtypes.float8_e5m2),
    ],
)
@pytest.mark.usefixtures("small_chunks")
def test_a_cast_to_the_same_width_does_not_overflow_in_silence(net, source, value, dtype):
    file = file_of(net, source)
    load_module(InMemory(file), TABLE, skeleton(), dtype=dtype)
    file["img_in.bias"][0] = value
    with pytest.raises(CheckpointError, match=r"img_in.bias holds a value too large for"):
        load_module(InMemory(file), TABLE, skeleton(), dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_scale_does_not_overflow_in_silence(dtype):
    """Neither when the leaf is made of the tensor nor when the tensor is made of the leaf."""
    large = np.full(3, np.finfo(dtype).max / 2, dtype)
    want = {"a": jax.ShapeDtypeStruct((3,), dtype)}
    up, down = (Table.parse(f'[rename]\na = "b"\n[scale]\na = {s}') for s in (4.0, 0.25))
    with pytest.raises(CheckpointError, match=r"vae: b holds a value too large for float"):
        load_module(InMemory({"b": large}), up, want, name="vae")
    assert dict(export_tensors({"a": large}, up))["b"][0] == large[0] / 4
    with pytest.raises(CheckpointError, match=r"b holds a value too large for float"):
        dict(export_tensors({"a": large}, down))


@pytest.mark.usefixtures("small_chunks")
def test_a_mixed_file_keeps_its_dtypes(net):
    """A leaf of several tensors has the widest of theirs, and nothing has 8 bits."""
    file = {name: array.astype(np.float16) for name, array in file_of(net).items()}
    file["mod.weight"] = file["mod.weight"].astype(np.float32)
    file["mod.bias"] = file["mod.bias"].astype(ml_dtypes.float8_e4m3fn)
    file["blocks.1.qk.bias"] = file["blocks.1.qk.bias"].astype(ml_dtypes.bfloat16)
    file["blocks.2.proj.weight"] = file["blocks.2.proj.weight"].astype(np.float32)
    module = load_module(InMemory(file), TABLE, skeleton(), dtype=FILE)
    assert (module.norm.weight.dtype, module.norm.bias.dtype) == (jnp.float32, jnp.bfloat16)
    assert module.blocks.to_q.bias.dtype == module.blocks.to_k.bias.dtype == jnp.float32
    assert module.blocks.proj.weight.dtype == jnp.float32
    assert module.blocks.proj.bias.dtype == module.proj_in.weight.dtype == jnp.float16
    wide = load_module(InMemory(file), TABLE, skeleton(), dtype=np.float32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), module, wide)
    eight = InMemory(file_of(net, ml_dtypes.float8_e4m3fn))
    whole = load_module(eight, TABLE, skeleton(), dtype=FILE)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {jnp.dtype(jnp.bfloat16)}


def test_a_cpu_takes_the_array_without_a_copy():
    for shape in ((1000,), (3, read.HUGE_BYTES)):
        buffer = read.aligned_empty(shape, np.dtype(np.float32))
        assert buffer.shape == shape
        assert read.put(buffer, None).unsafe_buffer_pointer() == buffer.ctypes.data


class Counting(AbstractTensorSource):
    """Counts the elements read of each tensor."""

    def __init__(self, arrays):
        self.inner, self.read_count = InMemory(arrays), Counter()

    @property
    def tensors(self):
        return self.inner.tensors

    def read(self, name, index, out):
        self.read_count[name] += out.size
        self.inner.read(name, index, out)


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("specs", [(P("fsdp"), P("tensor")), (P(None, "tensor"), P(None))])
def test_leaves_are_placed_as_told(net, mesh, specs):
    """The same numbers wherever they lie; and each element is read once for all its devices."""

    def sharding(path, shape):
        stacked = path.startswith("blocks.")
        spec = specs[0] if len(shape) - stacked > 1 else specs[1]
        return NamedSharding(mesh, P(None, *spec) if stacked else spec)

    file = file_of(net)
    source = Counting(file)
    module = load_module(source, TABLE, skeleton(), sharding=sharding)
    assert_equal(module, net)
    assert module.norm.weight.sharding.spec == specs[0]
    shards = {shard.data.shape for shard in module.norm.weight.addressable_shards}
    assert shards == {(8, 8) if specs[0] == P("fsdp") else (32, 4)}
    reshaped = {"img_in.weight"}
    assert all(source.read_count[n] == array.size for n, array in file.items() if n not in reshaped)


def test_a_sharding_may_be_one_or_a_tree(net, mesh):
    one = NamedSharding(mesh, P())
    tree = jax.tree.map(lambda leaf: one, skeleton())
    for sharding in (one, tree):
        module = load_module(InMemory(file_of(net)), TABLE, skeleton(), sharding=sharding)
        assert_equal(module, net)
        assert all(leaf.sharding == one for leaf in jax.tree.leaves(module))


def test_a_module_on_a_mesh_is_exported_as_one_on_one_device(net, mesh):
    sharded = jax.device_put(net, NamedSharding(mesh, P()))
    for (name, array), (other, wanted) in zip(
        export_tensors(sharded, TABLE), export_tensors(net, TABLE), strict=True
    ):
        assert name == other
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.usefixtures("small_chunks")
def test_progress_counts_the_bytes(net, mesh):
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(net))
    for spec in (None, P("fsdp")):
        calls = []
        load_module(
            InMemory(file_of(net)),
            TABLE,
            skeleton(),
            sharding=lambda path, shape, spec=spec: (
                NamedSharding(mesh, spec) if spec and shape[0] % 4 == 0 else None
            ),
            progress=lambda *call, calls=calls: calls.append(call),
        )
        assert len(set(calls)) > len(jax.tree.leaves(net))
        assert calls == sorted(calls)
        assert calls[-1] == (total, total)


def test_shards_have_an_index_and_replace_what_was_there(tmp_path, net):
    stem = "diffusion_pytorch_model"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"{stem}.fp16.safetensors").write_text("")
    save_module(net, TABLE, tmp_path)
    paths = save_module(net, TABLE, tmp_path, max_shard_bytes=2000)
    assert len(paths) > 3
    assert {path.name for path in paths} | {"config.json", f"{stem}.fp16.safetensors"} == set(
        os.listdir(tmp_path)
    )
    index = json.loads(paths[-1].read_text())
    assert paths[-1].name == f"{stem}.safetensors.index.json"
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in file_of(net).values())
    for path in paths[:-1]:
        file = SafetensorsFile(path)
        assert {index["weight_map"][name] for name in file.tensors} == {path.name}
        assert len(file.tensors) == 1 or sum(i.nbytes for i in file.tensors.values()) <= 2000
    save_module(net, TABLE, tmp_path)
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_what_is_not_written_whole_is_not_written(tmp_path, net, monkeypatch, failure):
    """Neither new nor half-written files are left, and old ones stay."""
    save_module(net, TABLE, tmp_path / "old")
    before = (tmp_path / "old" / "diffusion_pytorch_model.safetensors").read_bytes()

    def fail(module, table):
        for count, item in enumerate(export_tensors(module, table)):
            if count == 5:
                raise failure
            yield item

    monkeypatch.setattr("eqxdiff.checkpoint.save.export_tensors", fail)
    wanted = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    for folder in ("old", "new/er"):
        with pytest.raises(wanted) as error:
            save_module(net, TABLE, tmp_path / folder, max_shard_bytes=2000)
        if wanted is CheckpointError:
            assert str(error.value).endswith("cannot be written: No space left on device.")
    assert os.listdir(tmp_path) == ["old"]
    assert os.listdir(tmp_path / "old") == ["diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "old" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path, net):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        save_module(net, TABLE, tmp_path / "file" / "folder")


def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path, net):
    (path,) = save_module(net, TABLE, tmp_path)
    os.truncate(path, os.path.getsize(path) - 1)
    with pytest.raises(CheckpointError, match="truncated, 1 of"):
        SafetensorsFile(path)
