"""Records diffusers' pipelines that start from pictures: image to image and inpainting of Stable
Diffusion 1.5, 2 and XL and of FLUX.1, stage by stage: python tests/reference/pictures.py"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import torch
from _torch import FIXTURES
from diffusers import PNDMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders import vae as autoencoder
from diffusers.utils import logging
from helpers import fake_noise, relative_error
from picture_files import (
    CASES,
    CROPPED,
    PNDM,
    PNDM_DEVIATION,
    PNDM_FIRST,
    PNDM_MEAN,
    PNDM_STEPS,
    RESIZED,
    encode_noise,
    make_mask,
    make_picture,
    make_rectangle,
    masks_of,
    pictures_of,
    write_case,
)
from PIL import Image


SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = {"crop": "crops_coords_top_left", "negative_crop": "negative_crops_coords_top_left"}
KINDS = {"sd": "StableDiffusion", "sdxl": "StableDiffusionXL", "flux": "Flux"}


def load(folder: Path, case: dict):
    model = write_case(folder, case)
    kind = next(kind for kind in ("sdxl", "flux", "sd") if case["model"].startswith(kind))
    more: dict = {"feature_extractor": None, "safety_checker": None} if kind == "sd" else {}
    task = "Inpaint" if "mask" in case else "Img2Img"
    cls = getattr(diffusers, f"{KINDS[kind]}{task}Pipeline")
    pipe = cls.from_pretrained(model, torch_dtype=torch.float32, **more)
    if "sampler" in case:
        pipe.scheduler = getattr(diffusers, case["sampler"]).from_config(pipe.scheduler.config)
    if kind != "flux" and not hasattr(pipe.text_encoder, "text_model"):
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder  # transformers 5 moved it
    pipe.vae.register_to_config(force_upcast=False)  # it would round the float64 run to float32
    if case.get("mask") == "soft":
        pipe.mask_processor.register_to_config(do_binarize=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def injected(pipe, seen: dict) -> Iterator[list[str]]:
    """Replaces every draw of noise, and records what the autoencoder and the solver see.

    Yields the draws in order, such as `encode 1x4x8x8`.
    """
    module, draws = sys.modules[type(pipe).__module__], []

    def draw(name: str, make: Callable) -> Callable:
        def randn(shape, generator=None, device=None, dtype=None, layout=None):
            draws.append(f"{name} {'x'.join(map(str, shape))}")
            return torch.from_numpy(make(*shape)).to(dtype)

        return randn

    encode, step = module.retrieve_latents, pipe.scheduler.step
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor or 0.0

    def retrieve(*args, **kwargs):
        z = encode(*args, **kwargs)
        seen.setdefault("encoded", []).append((z - shift) * scale)
        return z

    def solve(output, t, sample, *args, **kwargs):
        seen.setdefault("start", sample)
        seen.setdefault("timesteps", []).append(float(t))
        return step(output, t, sample, *args, **kwargs)

    theirs = module.randn_tensor, autoencoder.randn_tensor
    module.randn_tensor = draw("noise", fake_noise)
    autoencoder.randn_tensor = draw("encode", encode_noise)
    module.retrieve_latents, pipe.scheduler.step = retrieve, solve
    try:
        yield draws
    finally:
        module.randn_tensor, autoencoder.randn_tensor = theirs
        module.retrieve_latents, pipe.scheduler.step = encode, step


def arguments(case: dict, picture: int) -> dict:
    """What the user gives."""
    prompts, pictures, masks = case["prompts"], pictures_of(case, picture), masks_of(case)
    one = lambda images: images[0] if len(images) == 1 else images
    call = {
        "prompt": prompts,
        "image": one([Image.fromarray(image) for image in pictures]),
        "strength": case["strength"],
        "num_inference_steps": case["steps"],
        "guidance_scale": case.get("guidance", 0.0),
        "output_type": "pil" if "crop_padding" in case else "np",
    }
    if masks is not None:
        call["mask_image"] = one([Image.fromarray(mask) for mask in masks])
    if "crop_padding" in case:
        call["padding_mask_crop"] = case["crop_padding"]
    if masks is not None or case["model"].startswith("flux"):
        call |= {name: case[name] for name in ("height", "width")}
    if "max_sequence_length" in case:
        call["max_sequence_length"] = case["max_sequence_length"]
    if "negative_prompt" in case:
        call["negative_prompt"] = [case["negative_prompt"]] * len(prompts)
    call |= {name: tuple(case[name]) for name in SIZES if name in case}
    return call | {theirs: tuple(case[own]) for own, theirs in CROPS.items() if own in case}


def run(pipe, case: dict, dtype: torch.dtype, picture: int = 0) -> dict[str, np.ndarray]:
    pipe.to(dtype)
    after, seen, network = [], {}, pipe.components.get("unet") or pipe.transformer
    told = {}

    def see(module, args, kwargs):
        told.setdefault("time_ids", (kwargs.get("added_cond_kwargs") or {}).get("time_ids"))

    hook = network.register_forward_pre_hook(see, with_kwargs=True)
    keep = lambda pipe, i, t, kw: after.append(kw["latents"]) or kw
    with injected(pipe, seen) as draws:
        images = pipe(**arguments(case, picture), callback_on_step_end=keep).images
    hook.remove()
    h, w, steps = case["height"], case["width"], len(after)
    unpack = lambda x: x
    if case["model"].startswith("flux"):
        unpack = lambda x: pipe._unpack_latents(x, h, w, 8)
    level = lambda index: 1.0
    if type(pipe.scheduler).__name__ == "EulerDiscreteScheduler":
        # Their latents grow with the noise; ours keep their variance.
        begin = len(pipe.scheduler.sigmas) - 1 - steps
        level = lambda index: (pipe.scheduler.sigmas[begin + index] ** 2 + 1) ** 0.5
    record = {"start": unpack(seen["start"]) / level(0), "first": unpack(after[0]) / level(1)}
    record["final"] = unpack(after[-1])
    encoded = seen["encoded"]
    nine = case.get("channels") == 9
    if nine:
        record["masked"] = encoded.pop()
    if encoded:
        record["encoded"] = encoded[0]
    if told["time_ids"] is not None:
        record["time_ids"] = told["time_ids"]
    record = {name: value.double().numpy() for name, value in record.items()}
    return record | {
        "draws": np.array(draws),
        "timesteps": np.array(seen["timesteps"]),
        "images": np.stack([np.asarray(image) for image in images])
        if "crop_padding" in case
        else np.uint8(np.round(images * 255)),
    }


def run_processor() -> dict[str, np.ndarray]:
    """What the pipelines make of pictures and masks before and after they sample."""
    images = VaeImageProcessor()
    greys = VaeImageProcessor(do_normalize=False, do_convert_grayscale=True)
    pixels = lambda tensor, half: np.uint8(np.round(np.array(tensor[0] + half) * 255 / (1 + half)))
    picture = lambda tensor: pixels(tensor, 1).transpose(1, 2, 0)
    mask = lambda tensor: pixels(tensor, 0)[0]
    record = {}
    for i, (size, (h, w)) in enumerate(RESIZED):
        image, grey = (Image.fromarray(make(i, *size)) for make in (make_picture, make_mask))
        record[f"fit/{i}"] = picture(images.preprocess(image, height=h, width=w))
        record[f"mask/{i}"] = mask(greys.preprocess(grey, height=h, width=w))
        soft = greys.preprocess(greys.blur(grey, 3), height=h, width=w)
        record[f"blurred/{i}"] = mask(soft)
        small = torch.nn.functional.interpolate(soft, size=(h // 8, w // 8))
        record[f"latent/{i}"] = mask(small)
        hard = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
        record[f"hard/{i}"] = mask(hard.preprocess(grey, height=h, width=w))
    for i, (size, edges, (h, w), pad) in enumerate(CROPPED):
        image, made = (Image.fromarray(make_picture(j, *s)) for j, s in ((i, size), (9, (h, w))))
        grey = Image.fromarray(make_rectangle(size, edges))
        region = greys.get_crop_region(grey, w, h, pad=pad)
        record[f"region/{i}"] = np.array(region)
        fill = {"height": h, "width": w, "crops_coords": region, "resize_mode": "fill"}
        record[f"filled/{i}"] = picture(images.preprocess(image, **fill))
        record[f"filled mask/{i}"] = mask(greys.preprocess(grey, **fill))
        record[f"pasted/{i}"] = np.asarray(images.apply_overlay(grey, image, made, region))
    image, made = (Image.fromarray(make_picture(i, 64, 96)) for i in (1, 2))
    record["laid over"] = np.asarray(
        images.apply_overlay(Image.fromarray(make_mask(0, 64, 96)), image, made)
    )
    return record


def run_pndm() -> dict[str, np.ndarray]:
    """PNDM as the image-to-image pipelines run it, with the exact noise of normal data.

    They leave out as many of its timesteps as of other solvers' steps; but its second is listed
    twice, and its formulas take the second that they see for that one.
    """
    solver = PNDMScheduler(**PNDM)
    solver.set_timesteps(PNDM_STEPS)
    times = solver.timesteps[PNDM_FIRST:]
    clean, noise = (torch.from_numpy(make(16)).double() for make in (fake_noise, encode_noise))
    x = start = solver.add_noise(clean, noise, times[:1])
    for t in times:
        level = solver.alphas_cumprod[t].double()
        alpha, sigma = level**0.5, (1 - level) ** 0.5
        spread = (alpha * PNDM_DEVIATION) ** 2 + sigma**2
        x = solver.step(sigma * (x - alpha * PNDM_MEAN) / spread, t, x).prev_sample
    return {"timesteps": times.numpy(), "start": start.numpy(), "final": x.numpy()}


STAGES = ("encoded", "masked", "start", "first", "final")


@torch.no_grad()
def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = {f"processor/{name}": value for name, value in run_processor().items()}
    record |= {f"pndm/{name}": value for name, value in run_pndm().items()}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            pipe = load(Path(folder), case)
        single = run(pipe, case, torch.float32)
        double = run(pipe, case, torch.float64)
        others = {
            "moved": run(pipe, {**case, "prompts": case["others"]}, torch.float32),
            "moved by picture": run(pipe, case, torch.float32, picture=7),
        }
        print(name, *single["draws"], single["timesteps"], sep="; ")
        for kind, other in others.items():
            moved = relative_error(other["final"], single["final"])
            print(f"  {kind} {moved:.2f}", end="; ")
            record[f"{name}/{kind}"] = np.float32(moved)
        for stage, value in single.items():
            if stage not in STAGES:
                record[f"{name}/{stage}"] = value
                continue
            rounding = relative_error(value, double[stage])
            print(f"{stage} rounds by {rounding:.1e}", end="; ")
            record[f"{name}/{stage}"] = value.astype(np.float32)
            record[f"{name}/{stage}/rounding"] = np.float32(rounding)
        print(f"latents up to {abs(single['final']).max():.1f}")
    np.savez_compressed(FIXTURES / "pictures.npz", **record)


if __name__ == "__main__":
    main()
