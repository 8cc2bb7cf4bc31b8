"""The checkpoints, pictures, masks and noise that pictures from pictures are compared on."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from helpers import FIXTURES, write_checkpoint

from eqxdiff.models import find_model


CASES = json.loads((FIXTURES / "pictures.json").read_text())

RESIZED = [((75, 100), (64, 64)), ((64, 64), (64, 96)), ((40, 90), (80, 48)), ((33, 33), (64, 64))]
"""Height and width of pictures, and of what they are resized to."""

CROPPED = [
    ((96, 128), (20, 40, 50, 90), (64, 64), 0),
    ((96, 128), (20, 40, 50, 90), (64, 64), 7),
    ((96, 128), (0, 90, 100, 128), (64, 96), 4),
    ((96, 128), (90, 96, 0, 128), (96, 64), 0),
    ((60, 200), (10, 50, 3, 199), (64, 64), 5),
    ((200, 61), (150, 151, 60, 61), (40, 64), 2),
    ((60, 200), (0, 60, 10, 12), (64, 192), 0),
]
"""Height and width of pictures; first and last row and column of a grey rectangle in their masks;
height and width of what is made; padding."""

PNDM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""The scheduler's config of Stable Diffusion 1.5."""

PNDM_STEPS, PNDM_FIRST, PNDM_MEAN, PNDM_DEVIATION = 50, 10, 0.7, 0.5
"""Steps in all, the first that is taken, and the distribution of the data."""


def make_rectangle(size: tuple[int, int], edges: tuple[int, int, int, int]) -> np.ndarray:
    """A mask that is grey in a rectangle, (height, width), uint8."""
    mask = np.zeros(size, np.uint8)
    mask[edges[0] : edges[1], edges[2] : edges[3]] = 180
    return mask


def write_case(folder: Path, case: dict) -> Path:
    """Writes the checkpoint of a case, whose UNet may have nine input channels."""
    family, _ = find_model(case["model"])
    files = dict(family.example(case["model"]))
    if case.get("channels"):
        unet = json.loads(files["unet/config.json"])
        files["unet/config.json"] = json.dumps({**unet, "in_channels": case["channels"]})
    if changes := case.get("scheduler"):
        scheduler = json.loads(files["scheduler/scheduler_config.json"])
        files["scheduler/scheduler_config.json"] = json.dumps({**scheduler, **changes})
    write_checkpoint(folder, case["model"], case.get("gain", 1.0), files)
    widen_latents(folder / "vae")
    return folder


def widen_latents(folder: Path) -> None:
    """Multiplies the means of an autoencoder so that its latents have unit variance, as real ones.

    Without it the noise that the autoencoder draws would hide the picture.
    """
    config = json.loads((folder / "config.json").read_text())
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    last = "quant_conv" if "quant_conv.weight" in tensors else "encoder.conv_out"
    for name in (f"{last}.weight", f"{last}.bias"):
        tensors[name][: config["latent_channels"]] /= config.get("scaling_factor", 0.18215)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def pictures_of(case: dict, seed: int = 0) -> list[np.ndarray]:
    """The pictures of a case, (height, width, 3), uint8."""
    return [make_picture(seed + i, *size_of(case)) for i in range(case.get("pictures", 1))]


def masks_of(case: dict, seed: int = 0) -> list[np.ndarray] | None:
    """The masks of a case, (height, width), uint8, or `None` where there is none."""
    if "mask" not in case:
        return None
    return [make_mask(seed + i, *size_of(case)) for i in range(case.get("pictures", 1))]


def size_of(case: dict) -> tuple[int, int]:
    """Height and width of the picture that the user gives, which may differ from the result's."""
    return tuple(case.get("size", (case["height"], case["width"])))


def make_picture(seed: int, height: int, width: int) -> np.ndarray:
    """Blocks of random colours that darken to the right."""
    colours = np.random.RandomState(seed).randint(0, 256, (-(-height // 8), -(-width // 8), 3))
    blocks = np.kron(colours, np.ones((8, 8, 1)))[:height, :width]
    return np.uint8(blocks * np.linspace(1, 0.6, width)[:, None])


def make_mask(seed: int, height: int, width: int) -> np.ndarray:
    """White within an ellipse off the centre, black far from it, and every grey between."""
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    distance = np.hypot((y - 0.45) / 0.3, (x - 0.55 + 0.15 * (seed % 3)) / 0.35)
    return np.uint8(np.clip(255 * (1.5 - distance), 0, 255))


def encode_noise(*shape: int) -> np.ndarray:
    """The unit noise, in float32, of every draw from the autoencoder's distribution."""
    return np.random.RandomState(1).standard_normal(shape).astype(np.float32)
