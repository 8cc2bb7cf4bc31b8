"""What `eqxdiff generate` does, stage by stage. What can go wrong early is tried early."""

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqxdiff import SettingError
from eqxdiff.models import Settings, check_range, find_model
from eqxdiff.pipeline import Blueprint, check_noise, open_model

from .arrays import check_suffix, digest, encode_latents, read_noise
from .cache import Clock, CompileMeter, compile_cache
from .control import ControlOption, open_controls
from .generate import Request
from .mesh import batch_size_for, parse_mesh
from .metadata import applied, png, run_record, texts
from .output import picture_paths, reserved, write_whole
from .progress import AbstractReport, libraries_tell
from .prompts import collect_prompts
from .stages import Maker


def run(request: Request, report: AbstractReport) -> None:
    """Makes the pictures, and writes each as soon as its batch is done.

    **Raises:** `EqxdiffError` for whatever the user can mend. The pictures written until then stay.
    """
    find_model(request.model)
    options = [ControlOption.parse(text) for text in request.controls]
    if request.control_guess and not options:
        raise SettingError("--control-guess is for pictures of --control, and there is none.")
    prompts = collect_prompts(request.prompts, request.prompt_file)
    seeds = pick_seeds(request)
    paths = picture_paths(
        request.output,
        request.model,
        [prompt for prompt in prompts for _ in seeds],
        seeds * len(prompts),
    )
    if request.save_latents is not None:
        check_suffix("--save-latents", request.save_latents)
    if request.offload and request.release:
        raise SettingError("--offload keeps the text encoders and --release drops them: give one.")
    targets = [*paths, *(() if request.save_latents is None else [request.save_latents])]
    with contextlib.ExitStack() as stack:
        stack.enter_context(libraries_tell(report))
        stack.enter_context(reserved(targets, overwrite=request.overwrite))
        cache = None
        if request.caches:
            cache = stack.enter_context(compile_cache(request.compile_cache))
        meter = stack.enter_context(CompileMeter())
        clock = Clock(meter)
        controls = open_controls(
            options, guess=request.control_guess, as_is=request.control_as_is, report=report
        )
        with clock("load"):
            plan = open_plan(request, [option.net for option in options])
        if plan.compute_dtype == jnp.float32:
            # without it GPUs and TPUs multiply in less
            stack.enter_context(jax.default_matmul_precision("highest"))
        settings = plan.resolve(request.settings)
        batch_size = batch_size_for(plan.mesh, request.batch_size)
        schedule = plan.family.schedule(plan.configs, settings)
        for image in controls.images:
            image.resolve(settings, schedule)
        noise = open_noise(request.noise, plan, settings, len(paths))
        warn_of_dropped(plan, prompts, settings, report)
        if plan.note is not None:
            report.note("weights", plan.note)
        for lora in () if plan.adapters is None else plan.adapters.reports:
            report.note("warning" if lora.unused else "lora", str(lora), layers=dict(lora.layers))
        if request.seed is None:
            report.note("seed", f"seed: {seeds[0]}", seed=seeds[0])

        keep = "host" if request.offload else "nowhere" if request.release else "device"
        maker = Maker(plan, keep, clock, report)
        hashed = None if noise is None else digest(noise)
        made: list[dict[str, Any]] = []
        latents = []
        for picture in maker.pictures(
            prompts,
            request.settings,
            seed=seeds[0],
            num_images=len(seeds),
            batch_size=batch_size,
            noise=noise,
            controls=controls.images,
        ):
            path = paths[len(made)]
            record = run_record(plan, maker.dtypes, hashed, controls.record, batch_size)
            chunks = texts(picture, len(made), plan, record) if request.metadata else {}
            write_whole(path, png(picture, chunks), overwrite=request.overwrite)
            report.file(path)
            made.append({"file": str(path), "prompt": picture.prompt, "seed": picture.seed})
            latents.append(picture.latent)
        if request.save_latents is not None:
            data = encode_latents(request.save_latents, np.stack(latents))
            write_whole(request.save_latents, data, overwrite=request.overwrite)
            report.file(request.save_latents)
        report.finish(
            {
                **run_record(plan, maker.dtypes, hashed, controls.record, batch_size),
                "settings": applied(settings),
                "images": made,
                "files": [image["file"] for image in made],
                "seeds": [image["seed"] for image in made],
                "latents": None if request.save_latents is None else str(request.save_latents),
                "timings": {
                    "load_seconds": clock.seconds["load"],
                    "encode_seconds": clock.seconds["encode"],
                    "compile_seconds": meter.seconds,
                    "seconds_per_image": clock.seconds["images"] / len(made),
                },
                "compiled": {
                    "programs": meter.programs,
                    "cache_hits": meter.hits,
                    "cache": None if cache is None else str(cache),
                },
            }
        )


def open_plan(request: Request, controlnets: Sequence[str]) -> Blueprint:
    """All of the model but its weights."""
    return open_model(
        request.model,
        request.weights,
        parts=request.parts,
        controlnets=controlnets,
        steps=request.settings["steps"],
        loras=request.loras,
        lora_partial=request.lora_partial,
        lora_mode=request.lora_mode,
        revision=request.revision,
        dtype=request.dtype,
        compute_dtype=request.compute_dtype,
        mesh=parse_mesh(request.mesh),
    )


def open_noise(
    path: Path | None, plan: Blueprint, settings: Settings, count: int
) -> np.ndarray | None:
    """The initial noise of `count` images, if a file of it is given."""
    if path is None:
        return None
    noise = read_noise(path)
    h, w, c = plan.family.latent_shape(plan.configs, settings)
    check_noise(noise, (count, c, h, w))
    return noise


def warn_of_dropped(
    plan: Blueprint, prompts: Sequence[str], settings: Settings, report: AbstractReport
) -> None:
    """Warns of every prompt that a text encoder sees only the beginning of."""
    texts = [(f"prompt {i}", text, settings.prompt_2) for i, text in enumerate(prompts, 1)]
    if settings.negative_prompt is not None:
        negative = ("negative prompt", settings.negative_prompt, settings.negative_prompt_2)
        texts.append(negative)
    for what, prompt, prompt_2 in texts:
        for encoder, tokens in plan.tokenize(prompt, prompt_2, settings).items():
            if tokens.dropped:
                report.note(
                    "warning",
                    f"{what} is too long for {encoder}, which takes {len(tokens.ids)} tokens; "
                    f"this is dropped: {tokens.dropped!r}",
                    encoder=encoder,
                    dropped=tokens.dropped,
                )


def pick_seeds(request: Request) -> list[int]:
    """Of the images of each prompt. **Raises:** `SettingError`."""
    check_range("num_images", request.num_images, 1, 2**31)
    end = 2**32 - request.num_images
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    check_range("seed", seed, 0, end)
    return list(range(seed, seed + request.num_images))
