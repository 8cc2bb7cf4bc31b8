"""A run: from a config and a folder of images to a trained model."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from PIL import Image

from .._errors import CheckpointError, TrainingError
from ..models import PROMPT
from ..pipeline import Pipeline, generate, to_bytes
from ..sampling.flow import FlowSchedulerConfig
from .config import TrainConfig
from .data import Example, batch_of, dropped, pick, read_folder, read_image
from .levels import AbstractLevels, Discrete, LogitNormal, Uniform
from .objectives import AutoencoderObjective, DenoiserObjective
from .optimizer import make_optimizer, matrix_axes
from .saving import load_state, read_facts, save_state, saved_states
from .step import Loss, Task, TrainState, train_step
from .studio import (
    Studio,
    encode_images,
    measured,
    open_studio,
    reconstruct,
    split,
    write_model,
)


Report = Callable[[str, Mapping[str, Any]], None]
"""Called with an event and its facts: `"note"` with a `message`; `"progress"` with `step`, `steps`,
`loss`, `images_per_second` and `seconds_left`; `"file"` with a `path`."""

LOG, STATES, SAMPLES, MODEL = "log.jsonl", "states", "samples", "model"


def train(
    config: TrainConfig, output: str | Path, *, resume: bool = False, report: Report | None = None
) -> Path:
    """Trains, and writes into `output` a log, sample pictures, states to go on from, and the model.

    A run that was stopped at any time goes on from its last state as if it never had.

    **Arguments:**

    - `resume`: go on with the run in `output`, which must have been of the same config but for the
        number of steps and what is told meanwhile.

    **Returns:** the folder of the model, in the published layout.

    **Raises:** `TrainingError` where `output` is in the way or the loss is not finite; `DataError`,
    `ConfigError`, `SettingError`, `SourceError` or `CheckpointError`.
    """
    report = report or (lambda event, facts: None)
    output = Path(output)
    last = _last_state(output, config, resume)
    examples = read_folder(
        config.data.folder, captions=not any(p.startswith("vae") for p in config.model.train)
    )
    images = np.stack(
        [read_image(example.path, config.data.height, config.data.width) for example in examples]
    )
    report("note", {"message": f"{len(examples)} images from {config.data.folder}"})
    studio = open_studio(config)
    batches, loss = _objective(studio, config, examples, images, report)
    params, frozen = split(studio)
    optimizer = make_optimizer(config.optimizer, config.run.steps, matrix_axes(studio, config))
    task = Task(
        frozen,
        loss,
        optimizer,
        jax.random.key(config.run.seed, impl="threefry2x32"),
        config.optimizer.ema_decay,
        config.run.accumulate,
    )
    state = TrainState.init(params, optimizer, ema=config.optimizer.ema_decay > 0)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    report("note", {"message": f"{count / 1e6:.2f} M parameters are trained"})
    if last is not None:
        state = load_state(last, state)
        report("note", {"message": f"going on from step {int(state.step)}"})
    output.mkdir(parents=True, exist_ok=True)
    log = Log(output / LOG, int(state.step))
    show = lambda state: show_samples(studio, config, _modules(task, state), images, output)
    state = _loop(config, task, state, batches, log, output, report, show)
    modules = _modules(task, state)
    if studio.vae is None:
        modules["vae"] = measured(modules["vae"], images[:1024])
    else:
        modules["vae"] = studio.vae
    write_model(studio, modules, config, output / MODEL)
    report("file", {"path": output / MODEL})
    return output / MODEL


def _last_state(output: Path, config: TrainConfig, resume: bool) -> Path | None:
    """The state to go on from. **Raises:** `TrainingError` rather than mix two runs."""
    states = saved_states(output / STATES)
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise TrainingError(
                f"{output} exists already: give --resume to go on with the run in it, "
                "or another --output."
            )
        return None
    if not states:
        if output.exists() and any(path.name != LOG for path in output.iterdir()):
            raise TrainingError(f"{output} holds no run to go on with: it has no {STATES}/step-*.")
        return None
    before = read_facts(states[-1]).get("config")
    if before != json.loads(json.dumps(config.decisive)):
        keys = _differences(before, json.loads(json.dumps(config.decisive)))
        raise TrainingError(
            f"{output} is the run of another config, which differs in {', '.join(keys)}: "
            "put them back, or give another --output."
        )
    return states[-1]


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [prefix.rstrip(".")] if before != now else []
    keys = sorted({*before, *now})
    return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{prefix}{k}.")]


def _objective(
    studio: Studio,
    config: TrainConfig,
    examples: list[Example],
    images: np.ndarray,
    report: Report,
) -> tuple[Callable[[int], PyTree], Loss]:
    """The batch of a step, and the loss."""
    run, fields, dtype = config.run, config.loss, jnp.dtype(config.model.compute_dtype)
    index = lambda step: batch_of(step, run.batch_size, len(images), run.seed)
    if studio.vae is None:
        return lambda step: jnp.asarray(images[index(step)]), AutoencoderObjective(
            fields.kl_weight, fields.edge_weight, dtype
        )
    blueprint = studio.blueprint
    report("note", {"message": "encoding the images"})
    latents = encode_images(studio.vae, images)
    report("note", {"message": "tokenizing the captions"})
    settings = _settings(studio, config)
    texts = ["", *(caption for example in examples for caption in example.captions)]
    model = blueprint.model
    tokenized = [
        model.tokenize(blueprint.tokenizers, text, settings, PROMPT).tokens for text in texts
    ]
    tokens = jax.tree.map(lambda *ids: np.stack(ids), *tokenized)
    counts = np.array([len(example.captions) for example in examples])
    first = 1 + np.cumsum(counts) - counts

    def batch(step: int) -> PyTree:
        chosen = index(step)
        text = first[chosen] + pick(step, counts[chosen], run.seed)
        empty = dropped(step, len(chosen), config.data.caption_dropout, run.seed)
        text = np.where(empty, 0, text)
        rows = jax.tree.map(lambda ids: jnp.asarray(ids[text]), tokens)
        return jnp.asarray(latents[chosen]), rows

    objective = DenoiserObjective(
        model,
        _levels(blueprint.configs["scheduler"], config),
        model.recipe(settings).parameterization,
        fields.min_snr_gamma or None,
        settings,
        dtype,
    )
    return batch, objective


def _levels(scheduler: Any, config: TrainConfig) -> AbstractLevels:
    fields = config.loss
    if not isinstance(scheduler, FlowSchedulerConfig):
        return Discrete.init(scheduler)
    if fields.levels == "uniform":
        return Uniform(fields.shift)
    return LogitNormal(fields.mean, fields.std, fields.shift)


def _settings(studio: Studio, config: TrainConfig, **given: Any) -> Any:
    data = config.data
    return studio.blueprint.resolve(
        {
            "height": data.height,
            "width": data.width,
            "max_sequence_length": data.max_sequence_length,
            **given,
        }
    )


def _modules(task: Task, state: TrainState) -> dict[str, Any]:
    return eqx.combine(state.averaged, task.frozen)


def _loop(
    config: TrainConfig,
    task: Task,
    state: TrainState,
    batches: Callable[[int], PyTree],
    log: "Log",
    output: Path,
    report: Report,
    show: Callable[[TrainState], Path | None],
) -> TrainState:
    run = config.run
    first, since, sums, parts = int(state.step), time.monotonic(), [], []
    seconds, images = 0.0, 0
    for step in range(first, run.steps):
        state, loss, metrics = train_step(task, state, batches(step))
        sums.append(loss)
        parts.append(metrics)
        done = step + 1
        if done % run.log_every == 0 or done == run.steps:
            value = float(jnp.mean(jnp.stack(sums)))
            others = {k: float(jnp.mean(jnp.stack([p[k] for p in parts]))) for k in parts[0]}
            now = time.monotonic()
            if done - first > run.log_every:  # the first steps compile
                seconds, images = seconds + now - since, images + len(sums) * run.batch_size
            speed = images / seconds if seconds else len(sums) * run.batch_size / (now - since)
            left = (run.steps - done) * run.batch_size / speed
            facts = {"step": done, "loss": value, **others, "images_per_second": round(speed, 2)}
            log.write(facts)
            report("progress", {**facts, "steps": run.steps, "seconds_left": left})
            if not math.isfinite(value):
                raise TrainingError(
                    f"The loss is not finite after step {done}: lower optimizer.learning_rate or "
                    "optimizer.clip; the last state is as it was."
                )
            sums, parts = [], []
            since = now
        paused = time.monotonic()
        if done % run.save_every == 0 or done == run.steps:
            save_state(output / STATES, done, state, {"step": done, "config": config.decisive})
        if run.sample_every and (done % run.sample_every == 0 or done == run.steps):
            path = show(state)
            if path is not None:
                report("file", {"path": path})
        since += time.monotonic() - paused
    return state


def show_samples(
    studio: Studio,
    config: TrainConfig,
    modules: Mapping[str, Any],
    images: np.ndarray,
    folder: Path,
) -> Path | None:
    """Writes a sheet of sample pictures; `None` where none are asked for."""
    sample = config.sample
    if studio.vae is None:
        chosen = images[np.linspace(0, len(images) - 1, sample.count).astype(int)]
        made = np.asarray(reconstruct(modules["vae"], jnp.asarray(chosen)))
        pictures = [
            picture for pair in zip(chosen / 2 + 0.5, made, strict=True) for picture in pair
        ]
    elif not sample.prompts:
        return None
    else:
        data = config.data
        pipe = Pipeline({**modules, "vae": studio.vae}, studio.blueprint)
        given: dict[str, Any] = {"cfg": sample.cfg} if sample.cfg > 1 else {}
        result = generate(
            pipe,
            sample.prompts,
            seed=sample.seed,
            batch_size=len(sample.prompts),
            steps=sample.steps,
            height=data.height,
            width=data.width,
            max_sequence_length=data.max_sequence_length,
            **given,
        )
        pictures = list(result.arrays)
    number = len(list((folder / SAMPLES).glob("*.png"))) if (folder / SAMPLES).exists() else 0
    path = folder / SAMPLES / f"{number:04d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        sheet(np.stack(pictures)).save(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from None
    return path


def sheet(pictures: np.ndarray, columns: int = 8) -> Image.Image:
    """Pictures in [0, 1] of one size, row by row in one."""
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    whole = np.ones((rows * height, columns * width, 3), np.float32)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        whole[top : top + height, left : left + width] = picture
    return Image.fromarray(to_bytes(np.clip(whole, 0, 1)))


@dataclasses.dataclass
class Log:
    """The run's JSONL file. What was logged after the state that it goes on from is dropped."""

    path: Path
    step: int

    def __post_init__(self):
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if self._before(line)]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def _before(self, line: str) -> bool:
        try:
            return json.loads(line)["step"] <= self.step
        except (ValueError, KeyError):
            return False

    def write(self, facts: Mapping[str, Any]) -> None:
        """Appends a line. **Raises:** `CheckpointError` where the disk is full."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "time": round(time.time(), 1)}) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}.") from None
