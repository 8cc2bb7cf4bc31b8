"""What a checkpoint holds, from its headers alone: nothing else of a file on the Hub is fetched."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub import constants

from .._errors import CheckpointError, SourceError
from ..checkpoint import check
from ..checkpoint.listing import condense
from ..checkpoint.table import table_name
from ..hub import Source, is_file, open_source
from ..hub.explain import NETWORK_ERRORS, explain
from ..models import Family, Lookalikes, find_model
from ..tensors import AbstractTensorSource, Box, SafetensorsFile, TensorInfo, open_tensors
from ..tensors.safetensors import MOST_HEADER_BYTES, parse_header
from .open import plain
from .recognise import denoisers, describe, find_pieces, leftovers, locate


HEAD_BYTES = 64 << 10
"""The number of bytes fetched of a remote file at first: most headers are shorter."""


@dataclasses.dataclass(frozen=True)
class Portrait:
    """What a checkpoint holds.

    **Fields:**

    - `model`: the model that it is of, in words; `None` where this is unknown.
    - `models`: the names of all models with such headers, the likeliest first.
    - `layout`: `"diffusers"`, `"single file"`, or `"component"` for one alone in a file.
    - `components`: by name, or by the name of the table where no model is known: its layout,
        prefix, number of tensors and parameters, bytes, and dtypes with their tensors.
    - `missing`: components or tensors that the model has besides.
    - `extra`: tensors that belong to nothing.
    - `problems`: other mismatches with its own configs.
    - `metadata`: the texts in the files' headers.
    """

    name: str
    model: str | None
    models: list[str]
    layout: str
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    components: dict[str, dict[str, Any]]
    missing: list[str]
    extra: list[str]
    problems: list[str]
    metadata: dict[str, str]


class Header(AbstractTensorSource):
    """The tensors of a file whose header alone is here."""

    def __init__(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]):
        self._tensors, self.metadata = dict(tensors), dict(metadata)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        raise CheckpointError(f"{name} cannot be read: only the header of its file is here.")


def inspect(spec: str, *, revision: str | None = None, pickle: bool = False) -> Portrait:
    """Looks at a file, a folder, a Hub repository or `REPOSITORY:FILE`.

    **Arguments:**

    - `revision`: of a repository.
    - `pickle`: whether pickles may be read.

    **Raises:** `SourceError`, or `CheckpointError` where a header is damaged.
    """
    if is_file(spec):
        path = Path(spec).expanduser()
        if path.exists():
            file = open_tensors(path, pickle=pickle)
        else:
            repository, _, name = spec.partition(":")
            file = remote_header(repository, name, revision)
        return _of_file(spec, file)
    return _of_folder(spec, open_source(spec, revision=revision), revision)


def _of_file(spec: str, file: AbstractTensorSource) -> Portrait:
    metadata = file.metadata if isinstance(file, SafetensorsFile | Header) else {}
    pieces, rest = find_pieces(file.tensors)
    sort = describe(file)
    drops = leftovers().drops
    components: dict[str, dict[str, Any]] = {}
    for piece in pieces:
        places = () if sort is None else sort.layout.items()
        layout = table_name(piece.table)
        name = next((n for n, place in places if place == (piece.table, piece.prefix)), layout)
        name = name if name not in components else piece.prefix
        infos = [file.tensors[tensor] for tensor in piece.names]
        components[name] = {"layout": layout, "prefix": piece.prefix, **_count(infos)}
    whole = sort is not None and len(pieces) > 1
    missing = [name for name in sort.layout if name not in components] if whole and sort else []
    extra = condense([name for name in rest if not drops(name)], file.tensors)
    layout = "single file" if len(pieces) != 1 else "component"
    infos = list(file.tensors.values())
    return _portrait(spec, sort, layout, infos, components, missing, extra, [], metadata)


def _of_folder(spec: str, source: Source, revision: str | None) -> Portrait:
    """Compares a folder with its own configs."""
    headers: dict[str, AbstractTensorSource] = {}
    metadata: dict[str, str] = {}
    problems: list[str] = []
    index = source.read_json("model_index.json")
    names = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    for name in names:
        if not source.exists(f"{name}/config.json"):
            continue
        try:
            files = [f for f in source.weight_files(name) if f.endswith(".safetensors")]
        except SourceError as error:
            problems.append(str(error))
            continue
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            header = _header(source, file, revision)
            tensors |= header.tensors
            metadata |= header.metadata
        headers[name] = Header(tensors, {})
    found = (describe(headers[name]) for name in denoisers() if name in headers)
    sort = next(found, None)
    infos = [info for header in headers.values() for info in header.tensors.values()]
    components = {name: _count(header.tensors.values()) for name, header in headers.items()}
    missing: list[str] = []
    if sort is not None and sort.models:
        family, _ = find_model(sort.models[0])
        missing = [name for name in family.components if name not in headers]
        problems += _misfits(family, source, headers)
    return _portrait(spec, sort, "diffusers", infos, components, missing, [], problems, metadata)


def _misfits(
    family: Family, source: Source, headers: Mapping[str, AbstractTensorSource]
) -> list[str]:
    problems = []
    for name, component in family.components.items():
        if name not in headers:
            continue
        try:
            skeleton = component.skeleton(
                component.parse(plain(source.read_json(f"{name}/config.json")))
            )
            tensors, table = locate(headers[name], component.table, skeleton)
            check({n: i.shape for n, i in tensors.tensors.items()}, table, skeleton, name=name)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _header(source: Source, file: str, revision: str | None) -> SafetensorsFile | Header:
    folder = Path(source.name).expanduser()
    if folder.is_dir():
        return SafetensorsFile(folder / file)
    return remote_header(source.name, file, source.identity["revision"])


def _count(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    infos = list(infos)
    dtypes = collections.Counter(str(info.dtype) for info in infos)
    return {
        "tensors": len(infos),
        "parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(dtypes.most_common()),
    }


def _portrait(
    name: str,
    sort: Lookalikes | None,
    layout: str,
    infos: list[TensorInfo],
    components: dict[str, dict[str, Any]],
    missing: list[str],
    extra: list[str],
    problems: list[str],
    metadata: Mapping[str, str],
) -> Portrait:
    count = _count(infos)
    models = [] if sort is None else list(sort.models)
    summary = None if sort is None else sort.summary
    sizes = count["parameters"], count["bytes"], count["dtypes"]
    return Portrait(
        name, summary, models, layout, *sizes, components, missing, extra, problems, dict(metadata)
    )


def remote_header(repository: str, file: str, revision: str | None) -> Header:
    """Reads the header of a safetensors file on the Hub by requests for its first bytes alone.

    **Raises:** `SourceError`, `CheckpointError`.
    """
    where = f"{repository}:{file}"
    if not file.endswith(".safetensors"):
        raise SourceError(f"{where} is no safetensors file: download it to look into it.")
    head, size = _fetch(repository, file, revision, 0, HEAD_BYTES)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(MOST_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{where} is not a valid safetensors file: it has no header.")
    if length > len(head) - 8:
        rest, _ = _fetch(repository, file, revision, len(head), 8 + length - len(head))
        head += rest
    tensors, _, metadata = parse_header(head[8 : 8 + length], size - 8 - length, where)
    return Header(tensors, metadata)


def _fetch(
    repository: str, file: str, revision: str | None, start: int, length: int
) -> tuple[bytes, int]:
    """Fetches some bytes of a remote file; returns them and the size of the file."""
    url = huggingface_hub.hf_hub_url(repository, file, revision=revision)
    headers = huggingface_hub.utils.build_hf_headers(library_name="eqxdiff")
    headers["Range"] = f"bytes={start}-{start + length - 1}"
    try:
        answer = huggingface_hub.get_session().get(url, headers=headers, follow_redirects=True)
        huggingface_hub.utils.hf_raise_for_status(answer)
    except (*NETWORK_ERRORS, huggingface_hub.errors.HfHubHTTPError) as error:
        offline = constants.HF_HUB_OFFLINE
        raise explain(error, repository, revision, file, offline=offline) from error
    size = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if answer.status_code != 206 or not size.isdigit():
        raise SourceError(f"The Hub does not give parts of {repository}:{file}: download it first.")
    return answer.content[:length], int(size)
