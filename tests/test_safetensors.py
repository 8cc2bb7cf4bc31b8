"""The safetensors reader: exact on good files, and one clear error for each kind of bad one."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from eqxdiff._errors import CheckpointError
from eqxdiff.tensors import SafetensorsFile
from eqxdiff.tensors.raw import SHORT_RUN_BYTES
from eqxdiff.tensors.safetensors import DTYPES, MergedSource, merge_shards, parse_header, read_index


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def raw(header, data=b""):
    """The bytes of a file with the given header: a dictionary, text or bytes."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return len(header).to_bytes(8, "little") + header + data


def write(folder, content, name="x.safetensors"):
    path = folder / name
    path.write_bytes(content)
    return path


def read(file, name, index=None):
    info = file.tensors[name]
    index = tuple((0, n) for n in info.shape) if index is None else index
    out = np.empty(tuple(stop - start for start, stop in index), info.dtype)
    file.read(name, index, out)
    return out


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path, "the file")
    return str(error.value)


def test_reads_every_dtype_as_the_reference_library_writes_it(tmp_path):
    """Bit for bit. The library has no numpy spelling for bfloat16 and float8, so those are raw."""
    random = np.random.RandomState(0)
    path = tmp_path / "x.safetensors"
    own = {ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2}
    wanted = {}
    for name, dtype in DTYPES.items():
        bits = random.bytes(6 * dtype.itemsize)
        if dtype == np.bool_:
            bits = bytes(byte & 1 for byte in bits)
        wanted[name] = np.frombuffer(bits, dtype).reshape(2, 3)
    plain = {name: a for name, a in wanted.items() if a.dtype.type not in own}
    safetensors.numpy.save_file({**plain, "scalar": np.array(3, np.float32)}, path)
    file = SafetensorsFile(path)
    assert set(file.tensors) == {*plain, "scalar"}
    for name, array in plain.items():
        assert file.tensors[name].dtype == array.dtype
        assert read(file, name).tobytes() == array.tobytes()
    assert read(file, "scalar") == 3
    for name in set(wanted) - set(plain):
        array = wanted[name]
        header = {"t": entry(name, (2, 3), (0, array.nbytes))}
        file = SafetensorsFile(write(tmp_path, raw(header, array.tobytes()), f"{name}"))
        assert file.tensors["t"].dtype == array.dtype
        assert read(file, "t").tobytes() == array.tobytes()


@pytest.mark.parametrize("columns", [6, SHORT_RUN_BYTES])
def test_reads_any_box(tmp_path, columns):
    """Short runs are cut from longer reads and long runs are read one by one: both are exact."""
    array = np.random.RandomState(0).randint(0, 99, (5, 3, columns)).astype(np.int32)
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"before": np.ones(3), "t": array, "empty": np.ones((0, 3))}, path)
    file = SafetensorsFile(path)
    boxes = [
        ((1, 4), (0, 3), (0, columns)),
        ((0, 5), (1, 3), (0, columns)),
        ((2, 5), (2, 3), (1, columns - 1)),
        ((0, 5), (0, 3), (3, 5)),
        ((1, 1), (0, 3), (0, columns)),
    ]
    for box in boxes:
        part = array[tuple(slice(*bounds) for bounds in box)]
        np.testing.assert_array_equal(read(file, "t", box), part)
    assert read(file, "empty").shape == (0, 3)


def test_metadata_and_fingerprint(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"t": np.ones(3)}, path, {"format": "pt"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    assert re.fullmatch("[0-9a-f]{64}", file.fingerprint)
    safetensors.numpy.save_file({"t": np.ones(4)}, path, {"format": "pt"})
    assert SafetensorsFile(path).fingerprint != file.fingerprint


GOOD = {"a": entry(), "b": entry("U8", (3,), (8, 11))}
DATA = bytes(11)


def test_the_example_that_the_faults_are_variations_of_is_good(tmp_path):
    assert set(SafetensorsFile(write(tmp_path, raw(GOOD, DATA))).tensors) == {"a", "b"}
    assert set(SafetensorsFile(write(tmp_path, raw(json.dumps(GOOD) + "   ", DATA))).tensors)
    assert SafetensorsFile(write(tmp_path, raw("{}"))).tensors == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes, too few"),
        (b"1234567", "7 bytes, too few"),
        (bytes(8) + b"{}", "does not begin with a brace"),
        (raw(GOOD, DATA)[:40], "truncated, its header has"),
        (raw(GOOD, DATA)[:-1], "truncated, 1 of 11 bytes"),
        (raw(GOOD, DATA + b"x"), "1 bytes follow the last tensor"),
        ((10**8 + 1).to_bytes(8, "little") + bytes(99), "more than 100000000 are allowed"),
        ((2**64 - 1).to_bytes(8, "little"), "more than 100000000 are allowed"),
        (b"PK\x03\x04" + bytes(99), "PyTorch pickle"),
        (b"\x80\x02\x8a\x0a" + bytes([0xFF] * 99), "PyTorch pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (raw("{" * 99999), "not JSON"),
        (raw('{"a":' + "[" * 99999), "nested too deeply"),
        (raw("[]"), "does not begin with a brace"),
        (raw(b"{\xff}"), "not JSON"),
        (raw('{"a": NaN}'), "'a' is not described|a is not described"),
        (raw('{"__metadata__": {"a": 1}}'), "__metadata__"),
        (raw('{"__metadata__": [1]}'), "__metadata__"),
        (raw('{"a": 1, "a": 2}'), "has a twice"),
        (raw('{"a": {"dtype": "F32", "dtype": "F16"}}'), "has dtype twice"),
        (raw('{"\\ud800": {}}'), "cannot be printed"),
        (raw('{"a\\u001b[2J": {}}'), "cannot be printed"),
        (raw({"a": {}}), "a is not described by"),
        (raw({"a": [1]}), "a is not described by"),
        (raw({"a": entry(more=1)}, bytes(8)), "a is not described by"),
        (raw({"a": entry("F12")}, bytes(8)), "unknown dtype F12"),
        (raw({"a": entry(3)}, bytes(8)), "unknown dtype 3"),
        (raw({"a": entry(["F32"])}, bytes(8)), "unknown dtype"),
        (raw({"a": entry(shape=(-2,))}, bytes(8)), "no list of sizes"),
        (raw({"a": entry(shape=(2.0,))}, bytes(8)), "no list of sizes"),
        (raw({"a": entry(shape=(True, 2))}, bytes(8)), "no list of sizes"),
        (raw({"a": entry(shape=(1,) * 33 + (2,))}, bytes(8)), "no list of sizes"),
        (raw({"a": {**entry(), "shape": 2}}, bytes(8)), "no list of sizes"),
        (raw({"a": entry(shape=(2**63,))}, bytes(8)), "no list of sizes"),
        (raw({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "larger than any memory"),
        (raw({"a": entry(shape=(2**62, 0), offsets=(0, 0))}), "larger than any memory"),
        (raw({"a": entry(shape=(10**15,))}, bytes(8)), "takes 4000000000000000 bytes"),
        (raw({"a": entry(shape=(3,))}, bytes(8)), "takes 12 bytes by its shape and 8"),
        (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "no start and end"),
        (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "no start and end"),
        (raw({"a": entry(offsets=(0,))}, bytes(8)), "no start and end"),
        (raw({"a": entry(offsets=(0.0, 8.0))}, bytes(8)), "no start and end"),
        (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "b overlaps"),
        (raw({"a": entry(), "b": entry()}, bytes(8)), "b overlaps"),
        (raw({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)), "b follows a gap"),
        (raw({"a": entry(offsets=(1, 9))}, bytes(9)), "a follows a gap"),
    ],
)
def test_a_bad_file_is_refused_with_its_fault(tmp_path, content, words):
    message = refusal(write(tmp_path, content))
    assert message.startswith("the file is not a valid safetensors file: ")
    assert re.search(words, message)
    assert len(message) < 400


def test_a_long_name_is_abbreviated(tmp_path):
    message = refusal(write(tmp_path, raw({"n" * 10**6: {}})))
    assert len(message) < 300


def test_what_is_no_file_is_refused(tmp_path):
    assert refusal(tmp_path / "none") == "the file cannot be read: No such file or directory."
    assert refusal(tmp_path) == "the file is not a file."
    os.mkfifo(tmp_path / "fifo")  # to open it would wait for ever
    assert refusal(tmp_path / "fifo") == "the file is not a file."


def test_a_file_that_is_cut_while_open_is_an_error(tmp_path):
    path = write(tmp_path, raw(GOOD, DATA))
    file = SafetensorsFile(path, "the file")
    os.truncate(path, os.path.getsize(path) - 2)
    with pytest.raises(CheckpointError, match="has become shorter"):
        read(file, "b")


def test_a_header_of_many_duplicates_is_refused_at_once():
    header = ("{" + ",".join(f'"a{i}": 1' for i in range(10**5)) + ', "a99999": 1}').encode()
    with pytest.raises(CheckpointError, match="a99999 twice"):
        parse_header(header, 0, "x")


def index(**weight_map):
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})


def test_shards_are_one_source(tmp_path):
    for i in range(2):
        safetensors.numpy.save_file({f"t{i}": np.full(3, i)}, tmp_path / f"{i}.safetensors")
    weight_map = read_index(index(t0="0.safetensors", t1="1.safetensors"), "the index")
    files = {shard: SafetensorsFile(tmp_path / shard) for shard in weight_map.values()}
    source = merge_shards(weight_map, files, "the index")
    assert isinstance(source, MergedSource)
    np.testing.assert_array_equal(read(source, "t1"), np.full(3, 1))


def test_shards_must_agree_with_their_index(tmp_path):
    for i in range(2):
        arrays = {f"t{i}": np.ones(3), "both": np.ones(3), f"more{i}": np.ones(3)}
        safetensors.numpy.save_file(arrays, tmp_path / f"{i}.safetensors")
    files = {f"{i}.safetensors": SafetensorsFile(tmp_path / f"{i}.safetensors") for i in range(2)}
    weight_map = {"t0": "1.safetensors", "t1": "1.safetensors", "both": "0.safetensors"}
    weight_map |= {"more0": "0.safetensors", "absent": "0.safetensors"}
    with pytest.raises(CheckpointError) as error:
        merge_shards(weight_map, files, "the index")
    assert str(error.value).splitlines() == [
        "the index does not agree with its files:",
        "  t0 is not in 1.safetensors",
        "  absent is not in 0.safetensors",
        "  both is in several files: 0.safetensors, 1.safetensors",
        "  more1 of 1.safetensors is not listed",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "not valid JSON"),
        ("[" * 99999, "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        (index(a="../x.safetensors"), "a is in ../x.safetensors, which is not a safetensors file"),
        (index(a="/etc/x.safetensors"), "not a safetensors file beside it"),
        (index(a="x.bin"), "not a safetensors file beside it"),
        (index(a=3), "not a safetensors file beside it"),
        (index(a="..\u0000.safetensors"), "not a safetensors file beside it"),
    ],
)
def test_a_bad_index_is_refused(text, words):
    with pytest.raises(CheckpointError, match="the index is damaged") as error:
        read_index(text, "the index")
    assert words in str(error.value)
