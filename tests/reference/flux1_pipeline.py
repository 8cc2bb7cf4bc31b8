"""Records diffusers' FluxPipeline, stage by stage: python tests/reference/flux1_pipeline.py"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from _torch import FIXTURES
from diffusers import FluxPipeline
from diffusers.utils import logging
from helpers import fake_noise, relative_error, write_checkpoint


CASES = json.loads((FIXTURES / "flux1_pipeline.json").read_text())


def run(pipe: FluxPipeline, case: dict, dtype: torch.dtype) -> dict[str, np.ndarray]:
    pipe.to(dtype)
    h, w, prompts = case["height"], case["width"], case["prompts"]
    channels = pipe.vae.config.latent_channels
    noise = fake_noise(len(prompts), channels, h // 8, w // 8)
    packed = pipe._pack_latents(torch.from_numpy(noise).to(dtype), *noise.shape)
    after = []
    common = {
        "prompt": prompts,
        "prompt_2": case.get("prompt_2"),
        "max_sequence_length": case["max_sequence_length"],
    }
    txt, pooled, _ = pipe.encode_prompt(**common)
    record = {"txt": txt.double().numpy(), "pooled": pooled.double().numpy()}
    call = dict(
        **common,
        height=h,
        width=w,
        num_inference_steps=case["steps"],
        guidance_scale=case.get("guidance", 3.5),
        latents=packed,
        callback_on_step_end=lambda pipe, i, t, kw: after.append(kw["latents"]) or kw,
    )
    if "cfg" in case:
        call |= {"true_cfg_scale": case["cfg"], "negative_prompt": case["negative_prompt"]}
        call["negative_prompt"] = [case["negative_prompt"]] * len(prompts)
        if "prompt_2" in case:
            call["negative_prompt_2"] = call["negative_prompt"]
    images = pipe(**call, output_type="np").images
    unpack = lambda x: pipe._unpack_latents(x, h, w, 8).double().numpy()
    return record | {"first": unpack(after[0]), "final": unpack(after[-1]), "images": images}


@torch.no_grad()
def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), case["model"], case["gain"])
            pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        single = run(pipe, case, torch.float32)
        double = run(pipe, case, torch.float64)
        other = run(pipe.to(torch.float32), {**case, "prompts": case["others"]}, torch.float32)
        moved = relative_error(other["final"], single["final"])
        print(f"{name}: another prompt moves the latents by {moved:.2f}", end="; ")
        for stage in ("txt", "pooled", "first", "final"):
            rounding = relative_error(single[stage], double[stage])
            print(f"{stage} rounds by {rounding:.1e}", end="; ")
            record[f"{name}/{stage}"] = single[stage].astype(np.float32)
            record[f"{name}/{stage}/rounding"] = np.float32(rounding)
        print(f"latents up to {abs(single['final']).max():.1f}")
        record[f"{name}/moved"] = np.float32(moved)
        record[f"{name}/images"] = np.uint8(np.round(single["images"] * 255))
    np.savez_compressed(FIXTURES / "flux1_pipeline.npz", **record)


if __name__ == "__main__":
    main()
