"""What several tests share: deterministic weights and the measure of error."""

import contextlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from compiling import compiled_fast as compiled_fast

from eqxdiff.checkpoint import export_infos, read_table
from eqxdiff.models import find_model


FIXTURES = Path(__file__).parent / "fixtures"
MANIFESTS = Path(__file__).parent / "manifests"


def fake_tensor(name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """A float32 tensor that depends on its name and shape alone.

    Matrices and kernels are normal with standard deviation `gain / sqrt(fan_in)`, so that signals
    keep their size. Vectors called `weight` are scattered about one, variances are positive, and
    other vectors are scattered about zero, so that no norm, bias or zero-initialised layer is
    trivial. The legacy generator's stream never changes.
    """
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        normal *= gain / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        normal = 1 + 0.3 * normal
    elif name.endswith("running_var"):
        normal = np.exp(0.5 * normal)
    else:
        normal *= 0.2
    return normal.astype(np.float32)


def fake_noise(*shape: int) -> np.ndarray:
    """Unit noise, in float32, that depends on its shape alone."""
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def relative_error(value, reference) -> float:
    """The L2 norm of the difference over that of the reference, in float64."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, f"{value.shape} is not {reference.shape}"
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def read_manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a real checkpoint, from `manifests/{name}.txt`.

    A line is a name and its sizes; `{0..11}` in a name stands for each of these numbers.
    """
    manifest = {}
    for line in (MANIFESTS / f"{name}.txt").read_text().splitlines():
        pattern, *sizes = line.split()
        names = [pattern]
        while match := re.search(r"\{(\d+)\.\.(\d+)\}", names[0]):
            numbers = range(int(match[1]), int(match[2]) + 1)
            names = [each.replace(match[0], str(n), 1) for each in names for n in numbers]
        manifest |= dict.fromkeys(names, tuple(map(int, sizes)))
    return manifest


def fake_module(init, *args, dtype=np.float32, gain: float = 1.0):
    """The module that `init(*args, key=..., dtype=...)` would make, filled with `fake_tensor`s."""
    make = lambda: init(*args, key=jax.random.key(0), dtype=dtype)
    skeleton = eqx.filter_eval_shape(make)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jnp.asarray(fake_tensor(name, leaf.shape, gain), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, skeleton)


def write_checkpoint(
    folder: Path, model: str, gain: float = 1.0, files: Mapping[str, str] | None = None
) -> Path:
    """A tiny checkpoint in the published layout whose every number depends on its name alone.

    `files` are its configs and tokenizers, by default the family's example.
    """
    family, _ = find_model(model)
    files = family.example(model) if files is None else files
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    for name, component in family.components.items():
        skeleton = component.skeleton(component.parse(json.loads(files[f"{name}/config.json"])))
        infos = export_infos(skeleton, read_table(component.table))
        tensors = {
            key: fake_tensor(f"{name}.{key}", info.shape, gain) for key, info in infos.items()
        }
        stem = "model" if component.stage == "text" else "diffusion_pytorch_model"
        metadata = {"format": "pt"}
        safetensors.numpy.save_file(tensors, folder / name / f"{stem}.safetensors", metadata)
    return folder


@contextlib.contextmanager
def count_compilations():
    """A list that grows by one with each program that XLA compiles, eager operations included."""
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
