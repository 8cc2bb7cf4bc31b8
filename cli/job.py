"""Runs `eqxdiff generate`, stage by stage. It finds a user's mistakes before it loads weights."""

import contextlib
import dataclasses
import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eqxdiff import SettingError, SourceError
from eqxdiff._files import exists
from eqxdiff.bulk import PromptLine, naming
from eqxdiff.distributed import gather_rows
from eqxdiff.models import applied, check_range, find_model
from eqxdiff.pictures import read_picture
from eqxdiff.pipeline import (
    Blueprint,
    Job,
    Request,
    Stages,
    chunks,
    cuts,
    expand,
    generate_each,
    open_model,
    png,
    run_record,
    share,
)
from eqxdiff.plan import (
    Artefact,
    Choice,
    Skeletons,
    auto_mesh,
    compile_picture,
    find_target,
    refuse_what_cannot_fit,
    spell_mesh,
)

from .arrays import check_suffix, digest, encode_latents, read_noise
from .cache import Clock, CompileMeter, compile_cache
from .control import ControlOption, OpenedControls, open_controls
from .hosts import digest_of, joined, order_facts
from .mesh import batch_size_for, mesh_of, parse_blocks
from .order import Order
from .output import picture_paths, reserved, write_whole
from .progress import AbstractReport, libraries_tell
from .prompts import collect_prompts
from .shards import BLOCK, check_shared, pick_shard, shard_paths, write_index


def run(order: Order, report: AbstractReport) -> None:
    """Makes the pictures, and writes each as soon as its batch is done.

    **Raises:** `EqxdiffError` for a mistake that the user can mend. Pictures that are written by
    then stay.
    """
    find_model(order.model)
    options = [ControlOption.parse(text) for text in order.control or ()]
    for name in ("control_guess", "control_as_is"):
        if getattr(order, name) and not options:
            raise SettingError(f"`{name}` would be ignored without `control`.")
    lines = collect_prompts(order.prompt or (), order.prompt_file)
    shard = pick_shard(order.shard_of, order.shard)
    if shard is not None:
        check_shared(order)
        lines = lines[shard[0] :: shard[1]]
        if not lines:
            report.note("shard", "there is no line for this job")
            return
    if order.save_latents is not None:
        check_suffix("--save-latents", order.save_latents)
    if order.offload and order.release:
        raise SettingError("`offload` keeps the text encoders and `release` drops them: give one.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(libraries_tell(report))
        hosts = stack.enter_context(
            joined(
                order.coordinator,
                order.process_id,
                order.num_processes,
                order.start_timeout,
                order_facts(order, lines),
                mesh=order.mesh,
                as_json=order.as_json,
            )
        )
        seeds = hosts.agree({}, own=pick_seeds(order))
        firsts = [line.number if shard and order.seed is None else seeds[0] for line in lines]
        requests = [
            request
            for line, first in zip(lines, firsts, strict=True)
            for request in line_requests(order, line, first)
        ]
        sources = [line for line in lines for _ in seeds]
        paths = None
        if shard is None:
            texts, drawn = [each.text for each in requests], [each.seed for each in requests]
            paths = picture_paths(order.output, order.model, texts, drawn)
        latents_file = () if order.save_latents is None else (order.save_latents,)
        first = paths or [Path(order.output) / "picture.png"]
        stack.enter_context(
            reserved([*first, *latents_file], overwrite=order.overwrite or shard is not None)
        )
        cache = None
        if not order.no_compile_cache:
            cache = stack.enter_context(compile_cache(order.compile_cache))
        meter = stack.enter_context(CompileMeter())
        clock = Clock(meter)
        controls = open_controls(
            options, guess=order.control_guess, as_is=order.control_as_is, report=report
        )
        pictures = open_pictures(order)
        with clock("load"):
            blueprint = open_blueprint(order, [option.net for option in options])
        crop = {"mask_blur": order.mask_blur, "mask_crop": order.mask_crop}
        more = {**pictures, **crop, "controls": controls.images}
        requests = [dataclasses.replace(request, **more) for request in requests]
        batch_size = batch_size_for(blueprint.mesh, order.batch_size)
        inputs = input_record(order, pictures, controls)
        todo = range(len(requests))
        if paths is None:
            paths = shard_paths(order, blueprint, sources, requests, inputs)
            todo = [index for index in todo if not exists(paths[index])]
            report.note("shard", f"{len(todo)} of {len(paths)} pictures are to be made")
        noise = None if order.noise is None else read_noise(order.noise)
        sample = make_job(blueprint, 0, requests[0], sources[0])
        h, w, c = sample.recipe.shape
        requests = share(requests, "noise", noise, (c, h, w))
        size = len(requests) if shard is None else BLOCK
        blocks = [todo[start : start + size] for start in range(0, len(todo), size)]
        make = lambda block: [make_job(blueprint, i, requests[i], sources[i]) for i in block]
        jobs = make(blocks[0]) if blocks else []
        keep = "host" if order.offload else "nowhere" if order.release else "device"
        programs = None
        if order.compiled is not None:
            artefact = Artefact.read(order.compiled)
            artefact.check(blueprint, jobs, batch_size)
            programs = artefact.programs()
        for job in jobs_of_each_form(jobs):
            refuse_what_cannot_fit(blueprint, job, batch_size, keep)
        tell(blueprint, jobs, report)
        if order.seed is None and shard is None:
            report.note("seed", f"seed: {seeds[0]}", seed=seeds[0])
        hosts.agree(
            {
                "the weights": str(blueprint.identity),
                "the LoRAs": str(blueprint.adapters and blueprint.adapters.record()),
                "the input pictures": str(inputs),
                "the number of pictures to make": len(todo),
                "the digest of the files to write": digest_of([str(path) for path in paths]),
            }
        )

        stages = Stages(blueprint, keep, progress=report.progress, clock=clock, programs=programs)
        hashed = None if noise is None else digest(noise)
        made: list[dict[str, Any]] = []
        latents = {}
        for number, block in enumerate(blocks):
            jobs = make(block) if number else jobs
            for picture in generate_each(
                stages, jobs, batch_size=batch_size, progress=report.progress
            ):
                path = paths[picture.index]
                record = run_record(
                    blueprint, stages.dtypes, stages.attention, hashed, inputs, batch_size
                )
                tells = {} if order.no_metadata else chunks(picture, blueprint, record)
                replace = order.overwrite or shard is not None
                write_whole(path, png(picture, tells), overwrite=replace)
                report.file(path)
                made.append({"file": str(path), "prompt": picture.prompt, "seed": picture.seed})
                if order.save_latents is not None:
                    latents[picture.index] = picture.latent
        if order.save_latents is not None:
            stacked = gather_rows(latents, len(requests), (c, h, w))
            data = encode_latents(order.save_latents, stacked)
            if hosts.index == 0:
                write_whole(order.save_latents, data, overwrite=order.overwrite)
                report.file(order.save_latents)
        if shard is not None and hosts.index == 0:
            write_index(order, shard, blueprint, sources, requests, paths)
        report.finish(
            {
                **run_record(
                    blueprint, stages.dtypes, stages.attention, hashed, inputs, batch_size
                ),
                "settings": applied(sample.settings),
                "images": made,
                "files": [image["file"] for image in made],
                "seeds": [image["seed"] for image in made],
                "latents": None if order.save_latents is None else str(order.save_latents),
                "timings": {
                    "load_seconds": clock.seconds["load"],
                    "encode_seconds": clock.seconds["encode"],
                    "compile_seconds": meter.seconds,
                    "seconds_per_image": clock.seconds["images"] / max(len(made), 1),
                },
                "compiled": {
                    "programs": meter.programs,
                    "cache_hits": meter.hits,
                    "cache": None if cache is None else str(cache),
                },
            }
        )


def line_requests(order: Order, line: PromptLine, seed: int) -> list[Request]:
    """Returns the requests of the pictures of a line. **Raises:** `SettingError`."""
    with naming(line.where):
        request = line.request(seed, order.settings)
        return expand(request, seed=0, num_images=order.num_images, given={})


def make_job(blueprint: Blueprint, index: int, request: Request, line: PromptLine) -> Job:
    """Makes the job of a picture. **Raises:** `SettingError`, `PromptError`."""
    with naming(line.where):
        return Job.make(blueprint, index, request)


def mesh_that_fits(order: Order, controlnets: Sequence[str]) -> str:
    """Chooses the mesh of all devices that is fastest of those that fit."""
    skeletons = Skeletons.of(open_blueprint(order, controlnets))
    settings = {name: value for name, value in order.settings.items() if value is not None}
    keep = "host" if order.offload else "nowhere" if order.release else "device"
    devices = jax.device_count()
    choice = Choice(settings, order.batch_size, {}, keep)
    return spell_mesh(auto_mesh(skeletons, find_target(None, devices), choice).choice.mesh)


def jobs_of_each_form(jobs: Sequence[Job]) -> list[Job]:
    """Returns one job of each size of pictures."""
    return list({(job.settings.height, job.settings.width): job for job in jobs}.values())


def open_blueprint(order: Order, controlnets: Sequence[str]) -> Blueprint:
    """Opens the model that the options name, without reading its weights."""
    mesh = order.mesh
    if mesh is not None and mesh.strip() == "auto":
        mesh = mesh_that_fits(dataclasses.replace(order, mesh=None), controlnets)
    return open_model(
        order.model,
        order.weights,
        parts=order.parts,
        controlnets=controlnets,
        steps=order.settings["steps"],
        loras=order.lora or (),
        lora_partial=order.lora_partial,
        lora_mode=order.lora_mode,
        revision=order.revision,
        dtype=order.dtype,
        compute_dtype=order.compute_dtype,
        attention=order.attention,
        attention_blocks=parse_blocks(order.attention_blocks),
        mesh=mesh_of(mesh),
    )


def open_pictures(order: Order) -> dict[str, Any]:
    """Reads the input pictures and the mask, where they are given. **Raises:** `SourceError`."""

    def read(name: str, path: Path) -> Any:
        try:
            return read_picture(path, name)
        except SourceError as error:
            raise SourceError(f"`{name}`: {error}") from None

    pictures: dict[str, Any] = {}
    if order.image:
        pictures["image"] = [read("image", path) for path in order.image]
    if order.mask is not None:
        pictures["mask"] = read("mask", order.mask)
    return pictures


def input_record(
    order: Order, pictures: dict[str, Any], controls: OpenedControls
) -> dict[str, Any]:
    """Returns the facts about the input pictures that are recorded, by the names of options."""
    facts = lambda path, picture: {
        "file": path.name,
        "sha256": hashlib.sha256(np.asarray(picture).tobytes()).hexdigest(),
    }
    record: dict[str, Any] = {}
    if order.image:
        images = list(map(facts, order.image, pictures["image"]))
        record["image"] = images[0] if len(images) == 1 else images
    if order.mask is not None:
        record["mask"] = facts(order.mask, pictures["mask"])
    crop = {"mask_blur": order.mask_blur or None, "mask_crop": order.mask_crop}
    record |= {name: value for name, value in crop.items() if value is not None}
    return record | ({"controls": controls.record} if controls.record else {})


def tell(blueprint: Blueprint, jobs: Sequence[Job], report: AbstractReport) -> None:
    """Reports cut prompts, replaced parts and applied LoRAs before the pictures are made."""
    for cut in cuts(jobs):
        facts = dataclasses.asdict(cut)
        report.note("warning", str(cut), encoder=facts["encoder"], dropped=facts["dropped"])
    if blueprint.note is not None:
        report.note("weights", blueprint.note)
    for lora in () if blueprint.adapters is None else blueprint.adapters.reports:
        report.note("warning" if lora.unused else "lora", str(lora), layers=dict(lora.layers))


def pick_seeds(order: Order) -> list[int]:
    """Picks the seeds of the images of each prompt. **Raises:** `SettingError`."""
    check_range("num_images", order.num_images, 1, 2**31)
    end = 2**32 - order.num_images
    seed = secrets.randbelow(2**31) if order.seed is None else order.seed
    check_range("seed", seed, 0, end)
    return list(range(seed, seed + order.num_images))


def compile_order(order: Order, output: Path, platform: str | None) -> None:
    """Compiles the programs of a picture, and writes them to a file whole.

    **Raises:** `EqxdiffError` for a mistake that the user can mend.
    """
    find_model(order.model)
    with reserved([output], overwrite=order.overwrite):
        compute_dtype = order.compute_dtype
        if compute_dtype is None and platform is not None:
            compute_dtype = "float32" if platform == "cpu" else "bfloat16"
        blueprint = open_blueprint(dataclasses.replace(order, compute_dtype=compute_dtype), [])
        batch_size = batch_size_for(None, order.batch_size)
        job = Job.make(blueprint, 0, Request.make("", **order.settings))
        data = compile_picture(blueprint, job, batch_size, platform)
        write_whole(output, data, overwrite=order.overwrite)
    print(output)
