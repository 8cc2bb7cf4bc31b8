"""Noise and latents in files: `.npy` or `.safetensors`, of shape `(n, channels, height, width)`."""

import hashlib
import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from eqxdiff import CheckpointError, SettingError, SourceError
from eqxdiff.tensors import SafetensorsFile


SUFFIXES = (".npy", ".safetensors")


def check_suffix(option: str, path: Path) -> None:
    """**Raises:** `SettingError` where the file's name does not say its format."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingError(f"{option} {path} ends neither in .npy nor in .safetensors.")


def read_noise(path: Path) -> np.ndarray:
    """Reads the one array of a file of floating point numbers, as float32.

    **Raises:** `SourceError`; `CheckpointError` where the file is damaged or holds several arrays.
    """
    check_suffix("--noise", path)
    if not path.is_file():
        raise SourceError(f"There is no file {path} to read noise from.")
    array = _read_npy(path) if path.suffix.lower() == ".npy" else _read_safetensors(path)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise CheckpointError(f"{path} holds {array.dtype} numbers, and noise is floating point.")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _read_npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, MemoryError):
        raise CheckpointError(f"{path} is no valid .npy file, or not all of one.") from None


def _read_safetensors(path: Path) -> np.ndarray:
    file = SafetensorsFile(path)
    if len(file.tensors) != 1:
        names = ", ".join(sorted(file.tensors)) or "none"
        raise CheckpointError(f"{path} should hold one tensor, the noise, and holds: {names}.")
    ((name, info),) = file.tensors.items()
    array = np.empty(info.shape, info.dtype)
    file.read(name, tuple((0, size) for size in info.shape), array)
    return array


def encode_latents(path: Path, latents: np.ndarray) -> bytes:
    """Returns the bytes of a file of latents, in the format that the file's name says."""
    if path.suffix.lower() == ".safetensors":
        return save({"latents": np.ascontiguousarray(latents)})
    buffer = io.BytesIO()
    np.save(buffer, latents)
    return buffer.getvalue()


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's numbers, in hex."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
