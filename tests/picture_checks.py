"""Pictures from pictures against diffusers, stage by stage, from the same noise."""

import contextlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from helpers import FIXTURES, fake_noise, relative_error
from picture_files import CASES, encode_noise, masks_of, pictures_of, write_case

import eqxdiff


OTHERS = ("model", "prompts", "others", "pictures", "mask", "channels", "size", "crop_padding")
"""What is in a case besides settings."""


@cache
def read_reference() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "pictures.npz") as file:
        return dict(file)


def given(case: dict) -> dict:
    return {name: value for name, value in case.items() if name not in OTHERS}


@cache
def load(name: str, root: Path) -> eqxdiff.Pipeline:
    """The pipeline of a case, whose files are written once."""
    case = CASES[name]
    return eqxdiff.load(case["model"], str(write_case(root / name, case)), dtype=jnp.float32)


@contextlib.contextmanager
def compiled_fast():
    """Compiles with less optimising, which would take most of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def requests_of(case: dict, picture: int = 0, **changes) -> list[eqxdiff.Request]:
    """One request for each prompt, each with a picture, a mask and noise of its own."""
    images, masks = pictures_of(case, picture), masks_of(case)
    shape = 4, case["height"] // 8, case["width"] // 8
    noise, encoding = fake_noise(len(case["prompts"]), *shape), encode_noise(len(images), *shape)
    requests = []
    for i, prompt in enumerate(case["prompts"]):
        fields = {"image": images[i], "encode_noise": encoding[i], "noise": noise[i]}
        if masks is not None:
            # diffusers rounds masks to black and white unless it is told not to.
            fields["mask"] = masks[i] if case["mask"] == "soft" else masks[i] >= 128
        if "crop_padding" in case:
            fields["mask_crop"] = case["crop_padding"]
        requests.append(eqxdiff.Request.make(prompt, **{**given(case), **fields, **changes}))
    return requests


def assert_agrees(value, name: str, floor: float, factor: float) -> None:
    """Within the floor, or some times what the reference itself loses to float32."""
    reference = read_reference()
    error = relative_error(value, reference[name])
    bound = max(floor, factor * float(reference[f"{name}/rounding"]))
    print(f"{name}: {error:.1e}, at most {bound:.1e}")
    assert error < bound, f"{name}: {error:.1e}"


def channels_first(latents) -> np.ndarray:
    return np.asarray(latents).transpose(0, 3, 1, 2)


def run_steps(pipe: eqxdiff.Pipeline, examples: list[eqxdiff.Example]) -> list[np.ndarray]:
    """The latents after each step, (n, c, h, w)."""
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *examples)
    modules = pipe.stage("denoiser")
    return [channels_first(step.x) for step in eqxdiff.steps(pipe.blueprint, modules, batch)]


def check_stages(name: str, root: Path) -> None:
    """The picture's latent, the noisy latent, the latents after the first step and the last."""
    case, pipe = CASES[name], load(name, root)
    examples = [eqxdiff.prepare(pipe, request) for request in requests_of(case)]
    start = channels_first(np.stack([example.start() for example in examples]))
    assert_agrees(start, f"{name}/start", 5e-6, 5)
    latents = run_steps(pipe, examples)
    assert len(latents) == len(read_reference()[f"{name}/timesteps"])
    assert_agrees(latents[0], f"{name}/first", 5e-6, 5)
    assert_agrees(latents[-1], f"{name}/final", 2e-5, 10)


def check_pictures(name: str, root: Path) -> None:
    """What `generate` makes, latents and 8 bits."""
    case = CASES[name]
    result = eqxdiff.generate(load(name, root), requests_of(case), batch_size=len(case["prompts"]))
    assert_agrees(result.latents, f"{name}/final", 2e-5, 10)
    images, wanted = np.stack(result.images), read_reference()[f"{name}/images"]
    assert images.shape == wanted.shape
    difference = np.abs(images.astype(np.int16) - wanted)
    assert difference.max() <= 1
    assert difference.mean() < 1e-3  # all values one too low would be no rounding error


def check_encoding(name: str, root: Path) -> None:
    """The picture's latent, and that of the picture without what is repainted."""
    case, pipe = CASES[name], load(name, root)
    examples = [eqxdiff.prepare(pipe, request) for request in requests_of(case)]
    kept = [e.clean if e.blend is None else e.blend.clean for e in examples]
    clean = [latent for latent in kept if latent is not None]
    if clean:  # else the picture is ignored
        assert_agrees(channels_first(clean), f"{name}/encoded", 5e-6, 5)
    if case.get("channels"):
        masked = [e.shared.inpaint[..., 1:] for e in examples]
        assert_agrees(channels_first(masked), f"{name}/masked", 5e-6, 5)


def check_reference(name: str) -> None:
    """Another prompt moves the final latents by a tenth at least, and so does another picture."""
    reference = read_reference()
    assert reference[f"{name}/moved"] > 0.1
    if name not in ("sd15-all", "dev-all"):  # which make the whole picture anew
        assert reference[f"{name}/moved by picture"] > 0.1
