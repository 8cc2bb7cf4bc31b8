"""The options of `eqxdiff generate`. What they do is in `job`, which imports JAX."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from .output import DEFAULT_NAME
from .progress import JsonReport, TextReport


Dtype = Literal["float32", "bfloat16", "float16"]
Stage = Literal["text"]
Spread = Literal["karras", "exponential", "beta", "ays"]
Spacing = Literal["leading", "trailing", "linspace"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
LoraMode = Literal["merge", "runtime"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for. `None` leaves it to the model or to chance.

    **Fields:**

    - `settings`: fields of `eqxdiff.Settings`.
    - `controls`: as in `canny=photo.png@0.5`.
    - `loras`: as in `style.safetensors@0.8`.
    - `parts`: component -> where its weights are, in place of the model's own.
    - `mesh`: sizes of its axes, as in `data=4,fsdp=2`.
    - `offload`, `release`: whether to move the text encoders to host memory between uses, or to
        drop them when all prompts are encoded.
    """

    model: str
    prompts: tuple[str, ...]
    prompt_file: str | None
    settings: dict[str, Any]
    controls: tuple[str, ...]
    control_guess: bool
    control_as_is: bool
    seed: int | None
    num_images: int
    batch_size: int | None
    output: str
    overwrite: bool
    metadata: bool
    weights: str | None
    parts: dict[str, str]
    loras: tuple[str, ...]
    lora_partial: bool
    lora_mode: LoraMode
    revision: str | None
    dtype: Dtype | None
    compute_dtype: Dtype | None
    noise: Path | None
    save_latents: Path | None
    offload: bool
    release: bool
    mesh: str | None
    compile_cache: Path | None
    caches: bool


def generate(
    model: Annotated[str, Argument(help="Such as flux-dev; `eqxdiff models` lists them.")],
    prompt: Annotated[
        list[str] | None, Option("--prompt", "-p", help="What to show. May be repeated.")
    ] = None,
    prompt_file: Annotated[
        str | None, Option(help="A file with a prompt on each line; - for standard input.")
    ] = None,
    prompt_2: Annotated[
        str | None, Option("--prompt-2", help="Another prompt for the second text encoder.")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        Option("--negative-prompt", "-n", help="What not to show, with classifier-free guidance."),
    ] = None,
    negative_prompt_2: Annotated[
        str | None, Option("--negative-prompt-2", help="The same for the second text encoder.")
    ] = None,
    steps: Annotated[
        int | None, Option("--steps", "--num-inference-steps", help="Denoising steps.")
    ] = None,
    guidance: Annotated[
        float | None,
        Option("--guidance", "-g", "--guidance-scale", help="How much the prompt counts."),
    ] = None,
    cfg: Annotated[
        float | None,
        Option(
            "--cfg",
            "--true-cfg-scale",
            help="True classifier-free guidance, for models that have embedded guidance.",
        ),
    ] = None,
    guidance_rescale: Annotated[
        float | None,
        Option(help="From 0 to 1: how far guidance returns to the unguided contrast."),
    ] = None,
    sequential_guidance: Annotated[
        bool,
        Option("--sequential-guidance", help="Guide in two calls of the network, to save memory."),
    ] = False,
    sampler: Annotated[
        str | None, Option(help="The solver; `eqxdiff samplers` lists them.")
    ] = None,
    schedule: Annotated[Spread | None, Option(help="How the noise levels are spread.")] = None,
    sigmas: Annotated[
        str | None, Option(help="The noise levels themselves, falling, as in 14.6,3.9,0.9.")
    ] = None,
    timestep_spacing: Annotated[
        Spacing | None, Option(help="Of the steps, instead of the checkpoint's.")
    ] = None,
    eta: Annotated[float | None, Option(help="From 0 to 1: DDIM's share of new noise.")] = None,
    prediction_type: Annotated[
        Prediction | None, Option(help="What the network predicts, instead of the checkpoint's.")
    ] = None,
    clip_skip: Annotated[
        int | None, Option(help="How many of CLIP's last layers to leave out besides the usual.")
    ] = None,
    shift: Annotated[
        float | None, Option(help="The shift of a flow's schedule, instead of the checkpoint's.")
    ] = None,
    max_sequence_length: Annotated[
        int | None, Option(help="How many tokens of a prompt the model sees.")
    ] = None,
    original_size: Annotated[
        str | None, Option(help="SDXL is told that the picture once was WIDTHxHEIGHT.")
    ] = None,
    crop: Annotated[
        str | None, Option(help="SDXL is told that it was cut off, in pixels: TOP,LEFT.")
    ] = None,
    target_size: Annotated[
        str | None, Option(help="SDXL is told that the picture is WIDTHxHEIGHT.")
    ] = None,
    negative_original_size: Annotated[
        str | None, Option(help="The same of what guidance leads away from.")
    ] = None,
    negative_crop: Annotated[str | None, Option(help="The same.")] = None,
    negative_target_size: Annotated[str | None, Option(help="The same.")] = None,
    control: Annotated[
        list[str] | None,
        Option(
            help="A ControlNet and its picture, NET=IMAGE[@SCALE[:START-END]], as in "
            "canny=photo.png@0.5. NET is a name, repository or folder. May be repeated."
        ),
    ] = None,
    control_guess: Annotated[
        bool, Option("--control-guess", help="Let the control picture guide without a prompt.")
    ] = False,
    control_as_is: Annotated[
        bool, Option("--control-as-is", help="Look for no edges in the picture of canny.")
    ] = False,
    width: Annotated[int | None, Option("--width", "-W", help="In pixels.")] = None,
    height: Annotated[int | None, Option("--height", "-H", help="In pixels.")] = None,
    seed: Annotated[
        int | None,
        Option(
            "--seed",
            "-s",
            help="Of the first image; image k has seed + k. Random by default.",
        ),
    ] = None,
    num_images: Annotated[int, Option(help="Images of each prompt.")] = 1,
    batch_size: Annotated[
        int | None, Option(help="Images made at once; 1 by default, or 1 a device of a mesh.")
    ] = None,
    output: Annotated[
        str,
        Option(
            "--output",
            "-o",
            help="A file, a folder, or a name with {model}, {seed}, {index}, {prompt}.",
        ),
    ] = DEFAULT_NAME,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace files that exist.")] = False,
    no_metadata: Annotated[
        bool, Option("--no-metadata", help="Leave the settings out of the PNG.")
    ] = False,
    weights: Annotated[
        str | None,
        Option(help="A folder in the diffusers layout, a Hub repository, or a single file."),
    ] = None,
    unet: Annotated[
        str | None, Option(help="Another UNet: a file, folder, repository or REPOSITORY:FILE.")
    ] = None,
    transformer: Annotated[str | None, Option(help="Another transformer, likewise.")] = None,
    vae: Annotated[str | None, Option(help="Another autoencoder, likewise.")] = None,
    text_encoder: Annotated[
        str | None, Option("--text-encoder", help="Another text encoder, likewise.")
    ] = None,
    text_encoder_2: Annotated[
        str | None, Option("--text-encoder-2", help="Another second text encoder, likewise.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        Option(
            help="A LoRA, as SPEC[@SCALE]: a file, repository or REPOSITORY:FILE, and perhaps a "
            "scale for all or for parts, as in a.safetensors@unet=0.8,text_encoder=0.4. "
            "May be repeated."
        ),
    ] = None,
    lora_partial: Annotated[
        bool, Option("--lora-partial", help="Accept LoRAs of which not all fits the model.")
    ] = False,
    lora_mode: Annotated[
        LoraMode, Option(help="Add LoRAs to the weights, or compute them beside the weights.")
    ] = "merge",
    revision: Annotated[
        str | None, Option(help="A branch, tag or commit of the repository.")
    ] = None,
    dtype: Annotated[
        Dtype | None, Option(help="Of the weights; the checkpoint's by default.")
    ] = None,
    compute_dtype: Annotated[
        Dtype | None, Option(help="Of the activations; float32 on a CPU, bfloat16 elsewhere.")
    ] = None,
    offload: Annotated[
        Stage | None, Option(help="Keep the text encoders in host memory while not in use.")
    ] = None,
    release: Annotated[
        Stage | None, Option(help="Encode all prompts first, then drop the text encoders.")
    ] = None,
    vae_tiling: Annotated[
        bool, Option("--vae-tiling", help="Decode large pictures tile by tile, to save memory.")
    ] = False,
    mesh: Annotated[
        str | None, Option(help="Spread over devices, as in data=4,fsdp=2 (and tensor=).")
    ] = None,
    noise: Annotated[
        Path | None,
        Option(help="Initial noise instead of the seeds': .npy or .safetensors of (n, c, h, w)."),
    ] = None,
    save_latents: Annotated[
        Path | None, Option(help="Write the final latents too, as --noise takes them.")
    ] = None,
    compile_cache: Annotated[
        Path | None,
        Option(help="Where to keep compiled programs; in the user's cache by default."),
    ] = None,
    no_compile_cache: Annotated[
        bool,
        Option(
            "--no-compile-cache",
            help="Keep no compiled programs.",
        ),
    ] = False,
    as_json: Annotated[
        bool, Option("--json", help="One JSON object on stdout, and events on stderr.")
    ] = False,
    quiet: Annotated[
        bool, Option("--quiet", "-q", help="Print nothing but files, warnings and errors.")
    ] = False,
) -> None:
    """Makes pictures from prompts."""
    from .job import run
    from .numbers import parse_crop, parse_floats, parse_size

    request = Request(
        model=model,
        prompts=tuple(prompt or ()),
        prompt_file=prompt_file,
        settings={
            "steps": steps,
            "height": height,
            "width": width,
            "max_sequence_length": max_sequence_length,
            "prompt_2": prompt_2,
            "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2,
            "guidance": guidance,
            "cfg": cfg,
            "sampler": sampler,
            "shift": shift,
            "guidance_rescale": guidance_rescale,
            "sequential_guidance": sequential_guidance or None,
            "schedule": schedule,
            "sigmas": parse_floats("--sigmas", sigmas),
            "timestep_spacing": timestep_spacing,
            "eta": eta,
            "prediction_type": prediction_type,
            "clip_skip": clip_skip,
            "original_size": parse_size("--original-size", original_size),
            "crop": parse_crop("--crop", crop),
            "target_size": parse_size("--target-size", target_size),
            "negative_original_size": parse_size(
                "--negative-original-size", negative_original_size
            ),
            "negative_crop": parse_crop("--negative-crop", negative_crop),
            "negative_target_size": parse_size("--negative-target-size", negative_target_size),
            "vae_tiling": vae_tiling or None,
        },
        controls=tuple(control or ()),
        control_guess=control_guess,
        control_as_is=control_as_is,
        seed=seed,
        num_images=num_images,
        batch_size=batch_size,
        output=output,
        overwrite=overwrite,
        metadata=not no_metadata,
        weights=weights,
        parts={
            name: spec
            for name, spec in {
                "unet": unet,
                "transformer": transformer,
                "vae": vae,
                "text_encoder": text_encoder,
                "text_encoder_2": text_encoder_2,
            }.items()
            if spec is not None
        },
        loras=tuple(lora or ()),
        lora_partial=lora_partial,
        lora_mode=lora_mode,
        revision=revision,
        dtype=dtype,
        compute_dtype=compute_dtype,
        noise=noise,
        save_latents=save_latents,
        offload=offload is not None,
        release=release is not None,
        mesh=mesh,
        compile_cache=compile_cache,
        caches=not no_compile_cache,
    )
    report = JsonReport(quiet) if as_json else TextReport(quiet)
    try:
        run(request, report)
    finally:
        report.close()
