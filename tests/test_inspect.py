"""`eqxdiff inspect`: what a checkpoint holds, from its headers."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from command import cli as cli, dev as dev
from helpers import read_manifest

from eqxdiff._errors import CheckpointError, SourceError
from eqxdiff.convert import inspect as module
from eqxdiff.convert.inspect import inspect, remote_header
from eqxdiff.hub import Source
from eqxdiff.hub.stores import Folder


pytest_plugins = ["whole_files"]


def header_only(path, shapes, metadata=None):
    """A file of zeros that takes no space on disk."""
    fields, end = {"__metadata__": metadata or {}}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        fields[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(fields).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_file_of_full_size(cli, tmp_path):
    """24 GB on paper, and nothing but the header is read."""
    shapes = {f"model.diffusion_model.{n}": s for n, s in read_manifest("flux1_dev_bfl").items()}
    shapes |= {f"vae.{name}": shape for name, shape in read_manifest("vae_flux_ldm").items()}
    shapes |= {"odd.weight": (3,)}
    path = header_only(tmp_path / "x.safetensors", shapes, {"modelspec.title": "mine"})
    outcome = cli("inspect", path, "--json")
    told = outcome.json
    assert (told["model"], told["models"]) == ("FLUX.1 [dev]", ["flux-dev"])
    assert told["layout"] == "single file"
    assert told["dtypes"] == {"bfloat16": len(shapes)}
    assert told["parameters"] == 11_901_408_320 + 83_819_683 + 3
    assert told["nbytes"] == 2 * told["parameters"]
    assert told["components"]["transformer"]["parameters"] == 11_901_408_320
    assert told["components"]["transformer"]["layout"] == "flux1_transformer_bfl"
    assert told["components"]["vae"]["prefix"] == "vae"
    assert told["missing"] == ["text_encoder", "text_encoder_2"]
    assert told["extra"] == ["odd.weight"]
    assert told["metadata"] == {"modelspec.title": "mine"}
    words = cli("inspect", path).out
    for line in (
        "model: FLUX.1 [dev] (flux-dev)",
        "missing: text_encoder_2",
        "extra: odd.weight",
        "metadata: modelspec.title: mine",
    ):
        assert line in words.splitlines()
    assert re.search(r"transformer +11,901,408,320 +\d+ +bfloat16 +flux1_transformer_bfl", words)


def test_nothing_from_a_file_controls_the_terminal(cli, tmp_path):
    """Line breaks do not make lines either."""
    evil = "a\x1b]0;x\x07b\nmodel: mine\u202e"
    shapes = read_manifest("vae_sd")
    outcome = cli("inspect", header_only(tmp_path / "x.safetensors", shapes, {evil: evil}))
    assert outcome.status == 0, outcome.err
    assert all(line.isprintable() for line in outcome.out.split("\n"))
    assert r"metadata: a\x1b]0;x\x07b\nmodel: mine\u202e: a\x1b]0;x" in outcome.out
    assert cli("inspect", tmp_path / "x.safetensors", "--json").json["metadata"] == {evil: evil}


def test_an_empty_entry_of_the_index_is_no_component(dev, tmp_path):
    shutil.copytree(dev, tmp_path / "x")
    file = tmp_path / "x" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "odd": [], "other": [None]}))
    assert inspect(str(tmp_path / "x")).problems == []


def test_a_component_alone(tmp_path):
    path = header_only(tmp_path / "ae.safetensors", read_manifest("vae_flux_ldm"))
    portrait = inspect(str(path))
    assert (portrait.model, portrait.layout, portrait.missing) == (None, "component", [])
    assert list(portrait.components) == ["vae_ldm"]


def test_a_folder_is_held_against_its_configs(cli, dev, tmp_path):
    told = cli("inspect", dev, "--json").json
    assert (told["layout"], told["model"]) == ("diffusers", "FLUX.1 [dev]")
    assert set(told["components"]) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert (told["missing"], told["problems"]) == ([], [])
    folder = tmp_path / "copy"
    shutil.copytree(dev, folder)
    (file,) = (folder / "vae").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    tensors["odd"] = tensors.pop("encoder.conv_in.bias")
    safetensors.numpy.save_file(tensors, file)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    file.rename(file.with_name("pytorch_model.bin"))
    portrait = inspect(str(folder))
    assert portrait.missing == ["text_encoder"]
    text = "\n".join(portrait.problems)
    assert "missing: encoder.conv_in.bias" in text
    assert "left over: odd" in text
    assert "can run any code" in text


@pytest.mark.parametrize("checkpoint", ["sdxl"], indirect=True)
def test_a_file_of_an_unknown_model(checkpoint):
    """The tiny sizes are those of no model; the layout is told all the same."""
    _, folder = checkpoint
    portrait = inspect(str(folder / "all.safetensors"))
    assert portrait.model is None
    tables = {part["layout"] for part in portrait.components.values()}
    assert tables == {"unet_sgm", "vae_ldm", "clip", "clip_openclip"}
    assert portrait.extra == []


@pytest.fixture
def remote(monkeypatch):
    """Serves a file by ranges, and counts the bytes."""
    content: dict[str, bytes] = {}
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = content.get(self.path)
            if data is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            sent.append(len(part))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    name = lambda repository, file, revision=None: f"{url}/{repository}/{file}"
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield content, sent
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("head", [16, 1 << 16])
def test_of_a_file_on_the_hub_only_the_header_is_fetched(remote, monkeypatch, head):
    monkeypatch.setattr(module, "HEAD_BYTES", head)
    content, sent = remote
    content["/a/b/c/x.safetensors"] = safetensors.numpy.save(
        {"a": np.zeros((100, 2000), np.float16), "b": np.zeros(3)}, {"k": "v"}
    )
    header = remote_header("a/b", "c/x.safetensors", None)
    assert {n: info.shape for n, info in header.tensors.items()} == {"a": (100, 2000), "b": (3,)}
    assert header.metadata == {"k": "v"}
    assert sum(sent) <= max(1000, head)
    portrait = inspect("a/b:c/x.safetensors")
    assert portrait.parameters == 200_003


class Remote(Folder):
    """A folder that passes for a repository, of which no weights may be downloaded."""

    @property
    def name(self):
        return "a/b"

    @property
    def identity(self):
        return {"repository": "a/b", "revision": "c0"}

    def paths(self, files):
        assert not any(file.endswith(".safetensors") for file in files)
        return super().paths(files)


def test_of_a_repository_no_weights_are_fetched(remote, dev, tmp_path, monkeypatch):
    """Configs, the index of shards, and headers by ranges; a variant counts like any weights."""
    folder = tmp_path / "copy"
    shutil.copytree(dev, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    names = list(tensors)
    file.unlink()
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:])):
        shard = f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00002.safetensors"
        weight_map |= dict.fromkeys(part, shard)
        safetensors.numpy.save_file({n: tensors[n] for n in part}, file.with_name(shard))
    index = file.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    content, sent = remote
    for path in folder.rglob("*.safetensors"):
        content[f"/a/b/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    monkeypatch.setattr(module, "open_source", lambda *_, **__: Source(Remote(folder)))
    monkeypatch.setattr(module, "HEAD_BYTES", 64)
    portrait = inspect("a/b")
    assert (portrait.missing, portrait.problems) == ([], [])
    assert portrait.components["transformer"]["tensors"] == len(tensors)
    assert sum(sent) < sum(map(len, content.values())) / 5


def test_what_is_wrong_with_a_file_on_the_hub(remote):
    content, _ = remote
    content["/a/b/x.safetensors"] = b"not a header at all"
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        remote_header("a/b", "x.safetensors", None)
    with pytest.raises(SourceError, match=r"a/b has no y\.safetensors"):
        remote_header("a/b", "y.safetensors", None)
    with pytest.raises(SourceError, match="no safetensors file"):
        inspect("a/b:model.ckpt")
