"""Records diffusers' Flux2KleinPipeline, stage by stage: python tests/reference/flux2.py

It writes flux2.npz into tests/fixtures, and the manifests of FLUX.2's transformers and autoencoder.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from _torch import FIXTURES, write_manifest
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders import single_file_utils
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.utils import logging
from flux2_files import CASES, PICTURES, fake_picture, original_transformer, write_case
from helpers import fake_noise, fake_tensor, relative_error
from qwen3 import TEMPLATE


SIZES = {
    "klein_4b": (5, 20, 24, 7680, False),
    "klein_9b": (8, 24, 32, 12288, False),
    "dev": (8, 48, 48, 15360, True),
}


def load(case: dict) -> Flux2KleinPipeline:
    with tempfile.TemporaryDirectory() as folder:
        path = write_case(Path(folder), case)
        pipe = Flux2KleinPipeline.from_pretrained(path, torch_dtype=torch.float32)
    pipe.tokenizer.chat_template = TEMPLATE
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sinusoid(t: torch.Tensor) -> torch.Tensor:
    """The sines and cosines of timesteps in float64, for the run in float64: diffusers has them in
    float32 always, and at 1000 two frequencies that are off by a bit show in the sixth digit."""
    angle = t.double()[:, None] * torch.exp(-np.log(10000) * torch.arange(128).double() / 128)
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def run(pipe: Flux2KleinPipeline, case: dict, dtype: torch.dtype) -> dict[str, np.ndarray]:
    pipe.to(dtype)
    if dtype == torch.float64:
        pipe.transformer.time_guidance_embed.time_proj.forward = sinusoid
    h, w, prompts = case["height"], case["width"], case["prompts"]
    noise = fake_noise(len(prompts), pipe.transformer.config.in_channels, h // 16, w // 16)
    length = {"max_sequence_length": case["max_sequence_length"]}
    txt, _ = pipe.encode_prompt(prompts, **length)
    record, after = {"txt": txt.double().numpy()}, []
    call = {}
    if "images" in case:
        call["image"] = [PIL.Image.fromarray(fake_picture(*size)) for size in case["images"]]
        seen = []
        prepare = pipe.prepare_image_latents
        pipe.prepare_image_latents = lambda **given: seen.append(prepare(**given)) or seen[-1]
    else:
        call |= {"height": h, "width": w}
    if "negative_prompt" in case:
        negative = [case["negative_prompt"]] * len(prompts)
        call["negative_prompt_embeds"], _ = pipe.encode_prompt(negative, **length)
    images = pipe(
        prompt=prompts,
        num_inference_steps=case["steps"],
        guidance_scale=case.get("guidance", 1.0),
        latents=torch.from_numpy(noise).to(dtype),
        callback_on_step_end=lambda pipe, i, t, kw: after.append(kw["latents"]) or kw,
        output_type="np",
        **length,
        **call,
    ).images
    if "images" in case:
        del pipe.prepare_image_latents
        record["references"] = seen[0][0][0].double().numpy()
    unpack = lambda x: x.double().numpy().transpose(0, 2, 1).reshape(noise.shape)
    first, final = unpack(after[0]), unpack(after[-1])
    return record | {"moved": first - noise, "final": final, "images": images}


def record_pipeline() -> dict[str, np.ndarray]:
    record = {}
    for name, case in CASES.items():
        pipe = load(case)
        single = run(pipe, case, torch.float32)
        other = run(pipe, {**case, "prompts": case["others"]}, torch.float32)
        double = run(pipe, case, torch.float64)
        moved = relative_error(other["final"], single["final"])
        print(f"{name}: another prompt moves the latents by {moved:.2f}", end="; ")
        for stage in sorted(set(single) - {"images"}):
            rounding = relative_error(single[stage], double[stage])
            print(f"{stage} rounds by {rounding:.1e}", end="; ")
            record[f"{name}/{stage}"] = single[stage].astype(np.float32)
            record[f"{name}/{stage}/rounding"] = np.float32(rounding)
        print(f"latents up to {abs(single['final']).max():.1f}")
        record[f"{name}/other"] = np.float32(moved)
        record[f"{name}/images"] = np.uint8(np.round(single["images"] * 255))
    return record


def record_pictures() -> dict[str, np.ndarray]:
    """Some pixels of reference pictures as the pipeline hands them to the autoencoder."""
    record, seen = {}, []
    pipe = load(CASES["edit"])

    class Enough(Exception):
        pass

    def stop(images, **_):
        seen.extend(images)
        raise Enough

    pipe.prepare_image_latents = stop
    for width, height in PICTURES:
        image = PIL.Image.fromarray(fake_picture(width, height))
        try:
            pipe(image=image, prompt="x", num_inference_steps=1, max_sequence_length=32)
        except Enough:
            pixels = seen.pop()[0].permute(1, 2, 0).numpy()
        record[f"pictures/{width}x{height}/size"] = np.array(pixels.shape[:2])
        record[f"pictures/{width}x{height}"] = pixels[::97, ::89].astype(np.float32)
    return record


def record_single_file() -> dict[str, np.ndarray]:
    """Checksums of the tensors that diffusers converts a tiny original file to."""
    shapes = original_transformer(32, 16, 24, 16, 2, 3, True)
    file = {name: torch.from_numpy(fake_tensor(name, shape)) for name, shape in shapes.items()}
    made = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(file)
    sums = {
        name: zlib.crc32(tensor.contiguous().numpy().tobytes()) for name, tensor in made.items()
    }
    return {"single_file": np.array(json.dumps(sums))}


def record_manifests() -> None:
    logging.set_verbosity_error()
    for kind, (double, single, heads, text, guidance) in SIZES.items():
        with torch.device("meta"):
            state = Flux2Transformer2DModel(
                num_layers=double,
                num_single_layers=single,
                num_attention_heads=heads,
                joint_attention_dim=text,
                guidance_embeds=guidance,
            ).state_dict()
        write_manifest(f"flux2_{kind}", {name: tensor.shape for name, tensor in state.items()})
        shapes = original_transformer(heads * 128, 128, text, 128, double, single, guidance)
        write_manifest(f"flux2_{kind}_bfl", shapes)
    with torch.device("meta"):
        state = AutoencoderKLFlux2().state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    write_manifest("vae_flux2", shapes, layers="no blocks")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record_manifests()
    shifts = [
        compute_empirical_mu(tokens, steps)
        for tokens in (256, 4096, 4300, 4301)
        for steps in (4, 50)
    ]
    np.savez_compressed(
        FIXTURES / "flux2.npz",
        shifts=np.array(shifts),
        **record_single_file(),
        **record_pipeline(),
        **record_pictures(),
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
