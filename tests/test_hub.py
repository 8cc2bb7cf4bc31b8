"""Folders and Hub repositories: what is fetched, and one clear sentence for each way to fail.

A small server imitates the Hub's paths, status codes and headers, and a process of its own talks to
it, since `huggingface_hub` reads its environment once, when it is imported.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from eqxdiff._errors import CheckpointError, ConfigError, SourceError
from eqxdiff.hub import open_source


COMMIT = "0123456789abcdef0123456789abcdef01234567"
TENSORS = {"a": np.arange(3, dtype=np.float32)}


def weights(**arrays):
    return safetensors.numpy.save(arrays or TENSORS)


def index(**weight_map):
    return json.dumps({"weight_map": weight_map}).encode()


FILES = {
    "model_index.json": b'{"_class_name": "FluxPipeline"}',
    "README.md": b"-",
    "transformer/config.json": b'{"a": [1]}',
    "transformer/diffusion_pytorch_model.safetensors": weights(),
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors.index.json": index(
        x="model-00001-of-00002.safetensors", y="model-00002-of-00002.safetensors"
    ),
    "text_encoder/model-00001-of-00002.safetensors": weights(x=np.ones(2)),
    "text_encoder/model-00002-of-00002.safetensors": weights(y=np.ones(3)),
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"a b",
    "flax.msgpack": b"-",
}


def write(folder: Path, files=FILES, **more):
    for name, content in {**files, **{n.replace("__", "/"): c for n, c in more.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return open_source(folder)


def read(source, name):
    info = source.tensors[name]
    out = np.empty(info.shape, info.dtype)
    source.read(name, tuple((0, n) for n in info.shape), out)
    return out


def test_a_folder_gives_json_weights_and_other_files(tmp_path):
    source = write(tmp_path)
    assert source.name == str(tmp_path)
    assert source.read_json("transformer/config.json") == {"a": [1]}
    assert source.exists("README.md")
    assert not source.exists("vae/config.json")
    assert source.path("README.md") == tmp_path / "README.md"
    assert source.folder("tokenizer") == tmp_path / "tokenizer"
    np.testing.assert_array_equal(read(source.tensors("transformer"), "a"), TENSORS["a"])
    shards = source.tensors("text_encoder")
    assert set(shards.tensors) == {"x", "y"}
    np.testing.assert_array_equal(read(shards, "y"), np.ones(3))


def test_a_folder_is_identified_by_its_name_and_headers(tmp_path):
    one = write(tmp_path / "a" / "model").identity
    assert one == write(tmp_path / "b" / "model").identity
    assert one["folder"] == "model"
    other = write(
        tmp_path / "b" / "model", {"vae/model.safetensors": weights(z=np.ones(1))}
    ).identity
    assert other["sha256"] != one["sha256"]


def test_the_dtype_of_a_source_is_that_of_most_bytes(tmp_path):
    content = weights(a=np.ones(9, np.float16), b=np.ones(4, np.float32), c=np.ones(99, np.int32))
    source = write(tmp_path, vae__diffusion_pytorch_model__safetensors=b"", **{})
    (tmp_path / "vae" / "model.safetensors").write_bytes(content)
    assert source.tensors("vae").dtype == np.float16
    assert source.tensors("transformer").dtype == np.float32


PLAIN = "diffusion_pytorch_model.safetensors"
FP16 = "diffusion_pytorch_model.fp16.safetensors"
SHARD = "diffusion_pytorch_model-00001-of-00001.safetensors"
LATE = "diffusion_pytorch_model.safetensors.index.fp16.json"
EARLY = "diffusion_pytorch_model.fp16.safetensors.index.json"
FP16_SHARD = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("names", "variant", "wanted"),
    [
        ([PLAIN, FP16], None, [PLAIN]),
        ([PLAIN, FP16], "fp16", [FP16]),
        ([FP16], None, [FP16]),
        ([LATE, FP16_SHARD], None, [LATE, FP16_SHARD]),
        ([EARLY, FP16_SHARD, PLAIN], "fp16", [EARLY, FP16_SHARD]),
        ([PLAIN, f"{PLAIN}.index.json", SHARD], None, [f"{PLAIN}.index.json", SHARD]),
        (["model.safetensors", "model.safetensors.index.json"], None, ["model.safetensors"]),
        (
            ["pytorch_model.bin", "model.safetensors", "flux.safetensors"],
            None,
            ["model.safetensors"],
        ),
    ],
)
def test_the_files_that_diffusers_and_transformers_would_choose(tmp_path, names, variant, wanted):
    shard = next((name for name in names if "-0000" in name), "model.safetensors")
    files = {f"unet/{n}": index(a=shard) if n.endswith("json") else weights() for n in names}
    source = write(tmp_path, files)
    assert source.weight_files("unet", variant=variant) == [f"unet/{name}" for name in wanted]
    assert set(source.tensors("unet", variant=variant).tensors) == {"a"}


def test_variants_that_leave_a_choice_must_be_named(tmp_path):
    source = write(tmp_path, {f"unet/diffusion_pytorch_model.{v}.safetensors": b"" for v in "ab"})
    with pytest.raises(SourceError, match="no plain weights, only these variants: a, b; name one"):
        source.tensors("unet")
    with pytest.raises(SourceError, match="no c weights, only these variants: a, b"):
        source.tensors("unet", variant="c")


def test_pickles_are_refused_with_a_way_out(tmp_path):
    source = write(tmp_path, {"vae/diffusion_pytorch_model.bin": b""})
    with pytest.raises(SourceError, match=r"only as a pickle .*can run any code.*convert"):
        source.tensors("vae")


def test_missing_weights_and_shards_are_named(tmp_path):
    source = write(tmp_path)
    with pytest.raises(SourceError, match="vae has no safetensors weights"):
        source.tensors("vae")
    (tmp_path / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of the 2 files .*: model-00002-of-00002"):
        source.tensors("text_encoder")


def test_damaged_json_is_a_clear_error(tmp_path):
    source = write(tmp_path, {"a.json": b"{", "b.json": b"[]", "c.json": b"\xff"})
    for name in ("a.json", "c.json"):
        with pytest.raises(ConfigError, match="is damaged: it is not valid JSON"):
            source.read_json(name)
    with pytest.raises(ConfigError, match="not a JSON object"):
        source.read_json("b.json")
    with pytest.raises(SourceError, match=r"has no vae/config.json\.$"):
        source.read_json("vae/config.json")
    with pytest.raises(SourceError, match=r"has no tokenizer\.$"):
        source.folder("tokenizer")


def test_a_damaged_index_is_a_clear_error(tmp_path):
    source = write(tmp_path, {"vae/model.safetensors.index.json": b"{}"})
    with pytest.raises(CheckpointError, match="has no weight_map"):
        source.tensors("vae")


def test_what_is_neither_folder_nor_repository(tmp_path):
    write(tmp_path)
    for name in ("./none", "/none/at/all", "none", "~/none", "a/b/c", "", tmp_path / "none"):
        with pytest.raises(SourceError, match=r"There is no folder .*; give a folder"):
            open_source(name)
    with pytest.raises(SourceError, match="is a file, but a folder in the diffusers layout"):
        open_source(tmp_path / "README.md")
    with pytest.raises(SourceError, match="is a local folder, which has no revision 'main'"):
        open_source(tmp_path, revision="main")


# The Hub's answers: what it says for each repository, to whom.
REFUSALS = {
    "gated/anonymous": (
        401,
        "GatedRepo",
        "Access to model gated/anonymous is restricted. You must have access to it and be "
        "authenticated to access it. Please log in.",
    ),
    "gated/licence": (
        403,
        "GatedRepo",
        "Access to model gated/licence is restricted and you are not in the authorized list. "
        "Visit https://huggingface.co/gated/licence to ask for access.",
    ),
    "gated/finegrained": (
        403,
        None,
        "Please enable access to public gated repositories in your fine-grained token settings to "
        "view this repository.",
    ),
    "gated/expired": (401, None, 'User Access Token "test" is expired'),
    "gated/invalid": (401, None, "Invalid credentials in Authorization header"),
    "no/private": (401, "RepoNotFound", "Invalid username or password."),
    "no/repository": (404, "RepoNotFound", "Repository not found"),
    "no/disabled": (403, None, "Access to this resource is disabled."),
    "no/reason": (403, None, "Forbidden for some reason."),
    "no/server": (501, None, "Not implemented"),
}


class FakeHub(BaseHTTPRequestHandler):
    """`owner/model` has FILES at `main` and at COMMIT; other repositories refuse as told above."""

    protocol_version = "HTTP/1.1"
    requests: list

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, *, body):
        self.requests.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository in REFUSALS:
            return self.refuse(*REFUSALS[repository])
        if repository not in ("owner/model", "owner/bare"):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        rest = parts[5:] if parts[0] == "api" else parts[3:]
        if rest[:1] not in (["main"], [COMMIT]):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if parts[0] == "api":
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in FILES.items()
            ]
            return self.send(json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        name = "/".join(rest[1:])
        if name not in FILES or repository == "owner/bare":
            return self.refuse(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha1(FILES[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(FILES[name], headers, body)

    def refuse(self, status, code, message):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(json.dumps({"error": message}).encode(), headers, True, status)

    def send(self, content, headers, body, status=200):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """The address of a running server and the list of the requests it gets."""
    requests: list[str] = []
    handler = type("Handler", (FakeHub,), {"requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests, server
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys, time
time.sleep = lambda seconds: None  # the library waits between its attempts to connect
from eqxdiff._errors import SourceError
from eqxdiff.hub import open_source

for name, options in json.loads(sys.argv[1]):
    try:
        source = open_source(name, **options)
        print(json.dumps([
            dict(source.identity),
            source.read_json("model_index.json")["_class_name"],
            sorted(source.tensors("transformer").tensors),
            sorted(source.tensors("text_encoder").tensors),
            sorted(file.name for file in source.folder("tokenizer").iterdir()),
            source.exists("vae/config.json"),
        ]))
    except SourceError as error:
        print(json.dumps(str(error)))
"""


def ask(home, *questions, endpoint="http://127.0.0.1:9", **environment):
    """What a new process prints for each repository, or pair of repository and options."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, **environment}
    variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    arguments = json.dumps([(q, {}) if isinstance(q, str) else q for q in questions])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        capture_output=True,
        text=True,
        env=variables,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


GOOD = [
    {"repository": "owner/model", "revision": COMMIT},
    "FluxPipeline",
    ["a"],
    ["x", "y"],
    ["merges.txt", "vocab.json"],
    False,
]


def test_a_repository_is_read_through_the_cache(tmp_path, hub):
    """Only what is asked for is downloaded, once; then it serves offline and without a network."""
    endpoint, requests, server = hub
    again = ("owner/model", {"revision": "main"})
    assert ask(tmp_path, "owner/model", again, endpoint=endpoint) == [GOOD, GOOD]
    fetched = [line.split("/", 5)[5] for line in requests if line.startswith("GET /owner/")]
    unwanted = {"README.md", "flax.msgpack", "transformer/config.json", "text_encoder/config.json"}
    assert sorted(fetched) == sorted(set(FILES) - unwanted)
    last = [line.split()[0] for line in requests if "/owner/" in line][-2:]
    assert last == ["HEAD", "GET"]  # is main still that commit, and what files are there
    requests.clear()
    assert ask(tmp_path, "owner/model", endpoint=endpoint, HF_HUB_OFFLINE="1") == [GOOD]
    assert not requests
    server.shutdown()
    server.server_close()
    assert ask(tmp_path, "owner/model", endpoint=endpoint) == [GOOD]


def test_each_refusal_of_the_hub_has_its_own_sentence(tmp_path, hub):
    endpoint, _, _ = hub
    names = [name for name in REFUSALS if name != "no/private"]
    answers = ask(tmp_path, *names, endpoint=endpoint, HF_TOKEN="hf_test")
    said = dict(zip(names, answers, strict=True))
    assert all(isinstance(message, str) and message.count(". ") == 0 for message in said.values())
    assert len(set(said.values())) == len(said)
    wanted = {
        "gated/anonymous": "you are not logged in; accept its licence at https://huggingface.co/"
        "gated/anonymous, then run `hf auth login` or set HF_TOKEN.",
        "gated/licence": "your account has no access to it; accept its licence at",
        "gated/finegrained": "your fine-grained token may not read gated repositories; enable",
        "gated/expired": "Your Hub token has expired; make a new one at",
        "gated/invalid": "The Hub does not know your token",
        "no/repository": "neither a folder nor a Hub repository no/repository; check the spelling, "
        "or if it is private, the rights of your token.",
        "no/disabled": "has been disabled on the Hub",
        "no/reason": "The Hub refuses no/reason: Forbidden for some reason; see",
        "no/server": "The Hub fails with status 501",
    }
    assert set(wanted) == set(said)
    for name, words in wanted.items():
        assert words in said[name]


def test_a_repository_that_is_not_found(tmp_path, hub):
    endpoint, _, _ = hub
    private, bare, spelled, revision = ask(
        tmp_path,
        "no/private",
        "owner/bare",
        "https://huggingface.co/owner/none",
        ("owner/model", {"revision": "v9"}),
        endpoint=endpoint,
    )
    assert "no/private; check the spelling, or if it is private, log in with" in private
    assert bare == (
        "owner/bare has no model_index.json, which every model in the diffusers layout has."
    )
    assert "nor a Hub repository owner/none; check" in spelled
    assert "owner/model has no branch, tag or commit 'v9'" in revision


def test_nothing_cached_offline_or_without_a_network(tmp_path):
    offline, unreachable = ask(tmp_path, ("owner/model", {"offline": True}), "owner/model")
    assert "not in the local cache, and the Hub is not asked because of offline mode" in offline
    assert "The Hub cannot be reached at http://127.0.0.1:9" in unreachable


def test_a_cache_that_is_only_in_part_there_says_so(tmp_path, hub):
    endpoint, _, _ = hub
    ask(tmp_path, "owner/model", endpoint=endpoint)
    for path in (tmp_path / "hub").rglob("diffusion_pytorch_model.safetensors"):
        path.unlink()
    (said,) = ask(tmp_path, "owner/model", HF_HUB_OFFLINE="1")
    assert said == (
        "owner/model/transformer has no safetensors weights in the local cache, and the Hub was "
        "not asked."
    )
