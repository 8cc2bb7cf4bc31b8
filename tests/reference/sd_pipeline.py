"""Records diffusers' pipelines of Stable Diffusion 1.5, 2 and XL, with ControlNets too, stage by
stage: python tests/reference/sd_pipeline.py"""

import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from _torch import FIXTURES
from diffusers import ControlNetModel
from diffusers.utils import logging
from helpers import fake_noise, relative_error
from PIL import Image
from sd_files import CASES, picture, write_case


SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = {"crop": "crops_coords_top_left", "negative_crop": "negative_crops_coords_top_left"}


def load(folder: Path, case: dict):
    model, nets = write_case(folder, case)
    xl = case["model"].startswith("sdxl")
    kind = "StableDiffusionXL" if xl else "StableDiffusion"
    more: dict = {} if xl else {"feature_extractor": None, "safety_checker": None}
    if nets:
        loaded = [ControlNetModel.from_pretrained(net) for net in nets]
        more["controlnet"] = loaded[0] if len(loaded) == 1 else loaded
        kind += "ControlNet"
    cls = getattr(diffusers, f"{kind}Pipeline")
    pipe = cls.from_pretrained(model, torch_dtype=torch.float32, **more)
    case = {**case, **case.get("reference", {})}  # what ours has for a default
    if "sampler" in case:
        changes = {k: case[k] for k in ("timestep_spacing", "prediction_type") if k in case}
        cls = getattr(diffusers, case["sampler"])
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **changes)
    if not hasattr(pipe.text_encoder, "text_model"):  # where diffusers looks, transformers 5 moved
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, case: dict, dtype: torch.dtype, seed: int = 0) -> dict[str, np.ndarray]:
    pipe.to(dtype)
    h, w, prompts = case["height"], case["width"], case["prompts"]
    noise = fake_noise(len(prompts), 4, h // 8, w // 8)
    after, seen = [], {}
    xl = "text_encoder_2" in pipe.components
    guides = case.get("guidance", 1.0) > 1
    texts = {k: case[k] for k in ("prompt_2", "negative_prompt", "negative_prompt_2") if k in case}
    texts = {name: [text] * len(prompts) for name, text in texts.items()}
    call = dict(
        prompt=prompts,
        **texts,
        height=h,
        width=w,
        num_inference_steps=case["steps"],
        guidance_scale=case.get("guidance", 0.0),
        clip_skip=case.get("clip_skip"),
        latents=torch.from_numpy(noise).to(dtype),
        callback_on_step_end=lambda pipe, i, t, kw: after.append(kw["latents"]) or kw,
        output_type="np",
    )
    if "controls" in case:
        controls = case["controls"]
        images = [Image.fromarray(picture(seed + i, h, w)) for i in range(len(controls))]
        several = {
            "image": images,
            "controlnet_conditioning_scale": [control["scale"] for control in controls],
            "control_guidance_start": [control.get("start", 0.0) for control in controls],
            "control_guidance_end": [control.get("end", 1.0) for control in controls],
        }
        call |= {n: v[0] if len(controls) == 1 else v for n, v in several.items()}
        call["guess_mode"] = controls[0].get("guess", False)
    elif "guidance_rescale" in case:
        call["guidance_rescale"] = case["guidance_rescale"]
    if xl:
        call |= {name: tuple(case[name]) for name in SIZES if name in case}
        call |= {theirs: tuple(case[own]) for own, theirs in CROPS.items() if own in case}

    def see(module, args, kwargs):
        """What the UNet is told, at the first step."""
        half = len(prompts) if guides else 0
        seen.setdefault("context", kwargs["encoder_hidden_states"][half:])
        if xl:
            pooled = kwargs["added_cond_kwargs"]["text_embeds"]
            seen.setdefault("pooled", pooled[half:])

    hook = pipe.unet.register_forward_pre_hook(see, with_kwargs=True)
    images = pipe(**call).images
    hook.remove()
    record = {name: value.double().numpy() for name, value in seen.items()}
    solver = type(pipe.scheduler).__name__
    first = after[1] if solver == "PNDMScheduler" else after[0]
    if solver.startswith("Euler"):
        # Their latents grow with the noise; ours keep their variance.
        first = first / (pipe.scheduler.sigmas[1] ** 2 + 1) ** 0.5
    return record | {
        "first": first.double().numpy(),
        "final": after[-1].double().numpy(),
        "images": images,
    }


@torch.no_grad()
def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            pipe = load(Path(folder), case)
        single = run(pipe, case, torch.float32)
        double = run(pipe, case, torch.float64)
        other = run(pipe, {**case, "prompts": case["others"]}, torch.float32)
        moved = relative_error(other["final"], single["final"])
        print(f"{name}: another prompt moves the latents by {moved:.2f}", end="; ")
        record[f"{name}/moved"] = np.float32(moved)
        if "controls" in case:
            other = run(pipe, case, torch.float32, seed=7)
            moved = relative_error(other["final"], single["final"])
            print(f"another picture by {moved:.2f}", end="; ")
            record[f"{name}/moved by picture"] = np.float32(moved)
        for stage in single:
            if stage == "images":
                continue
            rounding = relative_error(single[stage], double[stage])
            print(f"{stage} rounds by {rounding:.1e}", end="; ")
            record[f"{name}/{stage}"] = single[stage].astype(np.float32)
            record[f"{name}/{stage}/rounding"] = np.float32(rounding)
        print(f"latents up to {abs(single['final']).max():.1f}")
        record[f"{name}/images"] = np.uint8(np.round(single["images"] * 255))
    np.savez_compressed(FIXTURES / "sd_pipeline.npz", **record)


if __name__ == "__main__":
    main()
