"""Requests to pictures, batch by batch."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree
from PIL import Image as PILImage

from .._errors import EqxdiffError, SettingError
from ..distributed import own_rows
from ..models import Modules, check_range, tiles
from ..pictures import Pictured
from ..sampling import Hook
from ..sharding import BATCH_AXES, check_batch, check_picture
from .batch import Example, Job, batches, cuts, make_jobs, seed_key, stack_examples, to_bytes
from .blueprint import Progress
from .inputs import make_inputs, paste_back
from .pipeline import Pipeline
from .request import ControlImage, Prompts, Request, expand, share
from .sample import start_loop
from .stages import AbstractStages, stages_of
from .texts import Encoded, TextEncoder, warn_of_cuts


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image and how it came about.

    **Fields:**

    - `array`: float32, `(height, width, 3)`, in [0, 1]; `None` where nothing was decoded.
    - `latent`: float32, `(channels, height, width)`, unit variance, unpacked.
    - `index`: its place among the requests.
    - `prompt`, `seed`: of this image alone.
    - `settings`: as applied.
    """

    array: np.ndarray | None
    latent: np.ndarray
    index: int
    prompt: str
    seed: int
    settings: Any

    @property
    def image(self) -> PILImage.Image:
        """The image in 8 bits."""
        if self.array is None:
            raise SettingError("This picture was not decoded.")
        return PILImage.fromarray(to_bytes(self.array))


@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` returns: for each prompt in turn, its images.

    **Fields:**

    - `pictures`: with the settings of each.
    - `seeds`: of each image.
    """

    pictures: tuple[Picture, ...]

    @property
    def images(self) -> list[PILImage.Image]:
        """The images in 8 bits."""
        return [picture.image for picture in self.pictures]

    @property
    def arrays(self) -> np.ndarray:
        """Float32, `(n, height, width, 3)`, in [0, 1], where all are of one size."""
        return np.stack([each.array for each in self.pictures if each.array is not None])

    @property
    def latents(self) -> np.ndarray:
        """Float32, `(n, channels, height / 8, width / 8)`: the final latents."""
        return np.stack([picture.latent for picture in self.pictures])

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [picture.seed for picture in self.pictures]


def generate(
    source: Pipeline | AbstractStages,
    prompts: Prompts,
    *,
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 1,
    image: Pictured | Sequence[Pictured] | None = None,
    mask: Pictured | None = None,
    mask_blur: float = 0.0,
    mask_crop: int | None = None,
    controls: Sequence[ControlImage] = (),
    noise: Float[Array | np.ndarray, "n c h w"] | None = None,
    encode_noise: Float[Array | np.ndarray, "n c h w"] | None = None,
    hooks: Sequence[Hook] = (),
    progress: Progress | None = None,
    **given: Any,
) -> Result:
    """Makes `num_images` images of each prompt.

    Image `k` of a prompt starts from the noise of `jax.random.key(seed + k)`: the same alone, in
    any batch and on any mesh. Of several processes, each gets the pictures that its devices hold.

    **Arguments:**

    - `source`: a loaded pipeline, or `Stages` that load when they are needed.
    - `prompts`: texts, requests with settings of their own, or what `pipe.encode` returned.
    - `batch_size`: images in one compiled call. The last batch is padded, not recompiled.
    - `image`, `mask`, `mask_blur`, `mask_crop`, `controls`: as of `Request`, for all texts.
    - `noise`, `encode_noise`: the noise of all images in place of that of the seeds.
    - `hooks`: functions that change x0 or x in every step, shared by all images.
    - `progress`: called as `progress(what, done, total)`.
    - `given`: settings: `steps`, `guidance`, `negative_prompt`, `height`, `width`, `sampler` and so
        on, by default the model's.

    **Raises:** `SettingError` where a setting is out of range or would be ignored; `PromptError`.
    """
    requests = expand(
        prompts,
        seed=seed,
        num_images=num_images,
        given=given,
        image=image,
        mask=mask,
        mask_blur=mask_blur,
        mask_crop=mask_crop,
        controls=controls,
    )
    blueprint = stages_of(source).blueprint
    h, w, c = Job.make(blueprint, 0, requests[0]).recipe.shape
    requests = share(requests, "noise", noise, (c, h, w))
    requests = share(requests, "encode_noise", encode_noise, (c, h, w))
    jobs = make_jobs(blueprint, requests)
    warn_of_cuts(cuts(jobs))
    made = generate_each(source, jobs, batch_size=batch_size, hooks=hooks, progress=progress)
    return Result(tuple(sorted(made, key=lambda picture: picture.index)))


def generate_each(
    source: Pipeline | AbstractStages,
    requests: Sequence[Request | Job],
    *,
    batch_size: int = 1,
    decode: bool = True,
    hooks: Sequence[Hook] = (),
    progress: Progress | None = None,
) -> Iterator[Picture]:
    """Makes a picture of each request and yields it as soon as its batch is done.

    Of several processes, each yields the pictures that its own devices hold.

    Requests that differ in size, in the number of steps or in whether guidance is on are run by
    programs of their own; pictures then come out of order, with their `index`.

    **Arguments:** as of `generate`, and

    - `requests`: requests, or the jobs that `make_jobs` made of them.
    - `decode`: `False` for latents alone; then the autoencoder need not be loaded.
    """
    stages = stages_of(source)
    blueprint = stages.blueprint
    check_range("batch_size", batch_size, 1)
    check_batch(blueprint.mesh, batch_size)
    groups = batches(make_jobs(blueprint, requests), batch_size)
    for group in groups:
        recipe = group[0].recipe
        check_picture(blueprint.mesh, recipe.shape[0], recipe.guider.roles)
    total = sum(group[0].recipe.schedule.steps for group in groups)
    report = progress or (lambda what, done, total: None)
    texts = _encoded(stages, groups, report)
    done = 0
    for group in groups:
        encoded = next(texts)
        with stages.clock("images"):
            needed = any(job.encodes for job in group)
            vae = stages.modules("vae") if needed or decode else {}
            batch = stack_examples(_examples(stages, vae, group, encoded), batch_size)
            report("sampling", done, total)
            own, modules = stages.programs, stages.modules("denoiser")
            started = start_loop(
                blueprint, modules, batch, hooks, begin=own.begin, advance=own.advance
            )
            del modules
            stages.release("denoiser", started.loop.modules)
            if progress is None:
                x, attention = started.finish()
                stages.attention |= attention
            else:
                x = None
                for step in started.steps():
                    x, done = step.x.block_until_ready(), done + 1
                    stages.attention |= step.attention
                    report("sampling", done, total)
            pictures = _pictures(stages, vae if decode else None, group, x)
        yield from pictures


def _encoded(
    stages: AbstractStages, groups: Sequence[Sequence[Job]], report: Progress
) -> Iterator[list[dict[str, PyTree]]]:
    """Yields what the text encoders say of each batch; all are run first where they are to go."""
    total, done = sum(map(len, groups)), 0

    def encode(groups: Sequence[Sequence[Job]], *, last: bool) -> list[list[dict[str, PyTree]]]:
        if all(isinstance(job.request.prompt, Encoded) for group in groups for job in group):
            return [[_rows(job.request.prompt) for job in group] for group in groups]
        with stages.text(last=last) as modules, stages.clock("encode"):
            encoder = TextEncoder(stages.blueprint, modules, stages.programs.encode)
            made = [[_encode(encoder, job) for job in group] for group in groups]
            stages.attention |= encoder.attention
            return jax.block_until_ready(made)

    if stages.ahead:
        everything = encode(groups, last=True)
        report("encoding", total, total)
        yield from everything
        return
    for number, group in enumerate(groups):
        encoded = encode([group], last=number == len(groups) - 1)
        done += len(group)
        report("encoding", done, total)
        yield encoded[0]


def _encode(encoder: TextEncoder, job: Job) -> dict[str, PyTree]:
    if isinstance(job.request.prompt, Encoded):
        return _rows(job.request.prompt)
    return {role: encoder(text) for role, text in job.texts.items()}


def _rows(encoded: Any) -> dict[str, PyTree]:
    return jax.tree.map(lambda leaf: leaf[0], encoded.roles)


def _examples(
    stages: AbstractStages,
    vae: Modules,
    group: Sequence[Job],
    encoded: Sequence[Mapping[str, PyTree]],
) -> list[Example]:
    blueprint, examples = stages.blueprint, []
    for job, said in zip(group, encoded, strict=True):
        inputs = make_inputs(
            blueprint,
            vae,
            job.request,
            job.settings,
            job.recipe,
            job.pixels,
            job.references,
            seed_key(job.request.seed),
        )
        examples.append(job.example(blueprint, said, inputs))
    return examples


def _pictures(
    stages: AbstractStages, vae: Modules | None, group: Sequence[Job], x: Any
) -> list[Picture]:
    blueprint = stages.blueprint
    rows = lambda batch: own_rows(batch, blueprint.mesh, BATCH_AXES)
    arrays: Mapping[int, np.ndarray] = {}
    if vae is not None:
        images, used = stages.programs.decode(blueprint, vae, x, tiles(group[0].settings))
        arrays = rows(images)
        stages.attention |= used
    latents = rows(x.transpose(0, 3, 1, 2).astype(np.float32))
    pictures = []
    for row, job in enumerate(group):
        if row not in latents:
            continue  # another process has it
        array, latent = arrays.get(row), latents[row]
        check_finite(array, latent, job.request.text)
        if array is not None:
            array = paste_back(job.request, job.pixels, array)
        pictures.append(
            Picture(array, latent, job.index, job.request.text, job.request.seed, job.settings)
        )
    return pictures


def prepare(pipe: Pipeline, request: str | Request, **given: Any) -> Example:
    """Returns the arrays of one picture, for `sample_latent` and for a sampler of one's own.

    **Arguments:**

    - `request`: a prompt, or a request.
    - `given`: settings and fields of a `Request`.

    **Raises:** `SettingError`, `PromptError`.
    """
    if isinstance(request, str):
        request = Request.make(request, **given)
    stages = stages_of(pipe)
    job = Job.make(pipe.blueprint, 0, request)
    encoded = list(_encoded(stages, [[job]], lambda what, done, total: None))
    vae = stages.modules("vae") if job.encodes else {}
    return _examples(stages, vae, [job], encoded[0])[0]


def check_finite(array: np.ndarray | None, latent: np.ndarray, prompt: str) -> None:
    """**Raises:** `EqxdiffError` rather than pass on a black picture."""
    for name, value in (("latent", latent), ("decoded image", array)):
        if value is not None and not np.isfinite(value).all():
            raise EqxdiffError(
                f"The {name} of the prompt {prompt[:40]!r} has values that are not finite. "
                "Try `compute_dtype` float32."
            )
