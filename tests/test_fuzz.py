"""Whatever a weights file or its index holds: a clear error or success, with little memory."""

import json
import random
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxdiff._errors import CheckpointError
from eqxdiff.checkpoint import Table, load_module
from eqxdiff.tensors import SafetensorsFile
from eqxdiff.tensors.safetensors import read_index


TABLE = Table.parse("""
stack = ["blocks"]
drop = [".ids"]
[rename]
"out" = ["out", "final"]
[split]
"blocks.*.qk" = ["blocks.*.q", "blocks.*.k"]
""")

SKELETON = {
    "blocks": {
        "q": {"weight": jax.ShapeDtypeStruct((2, 3, 2), jnp.float32)},
        "k": {"weight": jax.ShapeDtypeStruct((2, 1, 2), jnp.float32)},
    },
    "out": {"weight": jax.ShapeDtypeStruct((5,), jnp.bfloat16)},
}

HEADER = {
    "__metadata__": {"format": "pt"},
    "blocks.0.qk.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
    "blocks.1.qk.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [32, 64]},
    "out.weight": {"dtype": "F16", "shape": [5], "data_offsets": [64, 74]},
    "x.ids": {"dtype": "U8", "shape": [0, 3], "data_offsets": [74, 74]},
}
DATA = np.linspace(1, 2, 16, dtype=np.float32).tobytes() + np.ones(5, np.float16).tobytes()

ODD_VALUES = [
    *(None, True, -1, 0, 1, 0.5, 1e400, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**4000),
    *("", "F32", "F8_E4M3", "BF16", "I64", "x", "\ud800", "\0", "²", "9" * 5000, "n" * 2000),
    *([], [0], [-1], [0, 2**62], [2**40, 2**40], [[1]], {}, {"dtype": "F32"}),
]
ODD_NAMES = ["", ".", "..", "blocks", "blocks.9.qk.weight", "blocks.²", "blocks." + "9" * 50]
ODD_NAMES += ["__metadata__", "final.weight", "é", "\x1b[2J", "a" * 10**5, "." * 900]


def frame(text: bytes, data: bytes = DATA) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def mutate_tree(pick: random.Random, node):
    """One node somewhere in the JSON is replaced, removed, doubled or renamed."""
    if isinstance(node, dict | list) and node and pick.random() < 0.8:
        key = pick.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = dict(node) if isinstance(node, dict) else list(node)
        kind = pick.random()
        if kind < 0.6:
            node[key] = mutate_tree(pick, node[key])
        elif kind < 0.75:
            del node[key]
        elif isinstance(node, list):
            node.insert(key, node[key])
        else:
            node[pick.choice(ODD_NAMES)] = node.pop(key) if kind < 0.9 else node[key]
        return node
    return pick.choice(ODD_VALUES)


def mutate_bytes(pick: random.Random, content: bytes) -> bytes:
    """Some bytes are changed, inserted, removed, repeated or moved, or the end is cut off."""
    content = bytearray(content)
    for _ in range(pick.choice([1, 1, 2, 5])):
        at = pick.randrange(len(content) + 1)
        length = pick.choice([1, 1, 2, 8, 30])
        kind = pick.randrange(5)
        if kind == 0:
            content[at : at + length] = pick.randbytes(length)
        elif kind == 1:
            content[at:at] = pick.choice([b"{", b"}", b"[", b'"', b",", b"0", b"-", b"\\", b"\xff"])
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


def mutant(seed: int) -> bytes:
    pick = random.Random(seed)
    kind = pick.randrange(4)
    text = json.dumps(HEADER).encode()
    if kind == 0:
        tree = HEADER
        for _ in range(pick.choice([1, 1, 2, 3])):
            tree = mutate_tree(pick, tree)
        return frame(json.dumps(tree).encode("utf-8", "surrogatepass"))
    if kind == 1:
        return frame(mutate_bytes(pick, text))
    if kind == 2:
        return frame(text, mutate_bytes(pick, DATA))
    return mutate_bytes(pick, frame(text))


def attempt(path) -> bool:
    """Loads the file. Only a `CheckpointError` may come out, and a short one."""
    try:
        file = SafetensorsFile(path, "file")
        assert sum(info.nbytes for info in file.tensors.values()) <= path.stat().st_size
        for name, info in file.tensors.items():
            out = np.empty(info.shape, info.dtype)
            file.read(name, tuple((0, n) for n in info.shape), out)
        load_module(file, TABLE, SKELETON)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    message.encode()
    assert len(message) < 4000
    return False


def test_mutated_files_give_a_clear_error_or_load(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(frame(json.dumps(HEADER).encode()))
    assert attempt(path)
    loaded = 0
    for seed in range(1500):
        path.write_bytes(mutant(seed))
        try:
            loaded += attempt(path)
        except BaseException:
            print(f"seed {seed}: {path.read_bytes()!r}")
            raise
    assert 15 < loaded < 750  # the mutations are neither all harmless nor all alike


def test_a_mutated_index_gives_a_clear_error_or_a_map():
    tree = {"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors", "b.c": "y"}}
    for seed in range(1000):
        pick = random.Random(seed)
        text = json.dumps(mutate_tree(pick, tree)).encode("utf-8", "surrogatepass")
        if pick.random() < 0.5:
            text = mutate_bytes(pick, text)
        try:
            for shard in read_index(text, "index").values():
                assert "/" not in shard
                assert shard.endswith(".safetensors")
        except CheckpointError as error:
            str(error).encode()


ENTRY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"a": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}}).encode(),
        b"{" + b",".join(ENTRY % i for i in range(2000)) + b"}",
        b"{" + b",".join(b'"%d":{}' % i for i in range(10**4)) + b"}",
        b'{"a":[' + b"{}," * 10**4 + b"0]}",
        b'{"a":' + b"[" * 10**6,
        b'{"a":' + b"9" * 10**6 + b"}",
        b'{"' + b"a" * 10**6 + b'":0}',
        b'{"' + b"." * 10**6 + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":0' + b" " * 10**6 + b"}",
        b'{"\\u0000' + b"\\ud800" * 10**5 + b'":0}',
    ],
    ids=[
        "huge shape",
        "tensors",
        "empty",
        "list",
        "deep",
        "number",
        "name",
        "dots",
        "blanks",
        "odd",
    ],
)
def test_a_header_made_to_waste_memory_does_not(tmp_path, text):
    """What it declares is never allocated; what it holds becomes Python objects, and no more."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(frame(text, b""))
    tracemalloc.start()
    attempt(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * path.stat().st_size + 10**6
