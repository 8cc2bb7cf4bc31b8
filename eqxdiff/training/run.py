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
from jax.sharding import Mesh

from .._errors import CheckpointError, TrainingError
from ..distributed import is_first, wait_for_all
from ..pipeline import cuts
from ..sharding import check_batch, shard_batch
from .batches import Batches, image_batches, latent_batches
from .config import TrainConfig
from .data import read_folder, read_image
from .objectives import make_objective
from .optimizer import make_optimizer, matrix_axes
from .samples import sample_jobs, write_samples
from .saving import load_state, read_facts, save_state, saved_states
from .step import Task, TrainState, train_step
from .studio import encode_images, measured, open_studio, write_model


Report = Callable[[str, Mapping[str, Any]], None]
"""Called with an event and its facts: `"note"` with a `message`; `"progress"` with `step`, `steps`,
`loss`, `images_per_second` and `seconds_left`; `"file"` with a `path`."""

LOG, STATES, SAMPLES, MODEL = "log.jsonl", "states", "samples", "model"


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool = False,
    mesh: Mesh | None = None,
    report: Report | None = None,
) -> Path:
    """Trains a model, and writes into `output` a log, sample pictures, states and the model.

    A run that was stopped at any time goes on from its last state and ends with the same bits as a
    run that was never stopped.

    **Arguments:**

    - `resume`: go on with the run in `output`. Its config must be the same in all that decides the
        numbers: only the number of steps, the intervals, the samples and the dtype of the finished
        model may differ.
    - `mesh`: spreads the batch, and the parameters by their sharding rules. Of several processes
        all call this with one folder, into which the first one writes.

    **Returns:** the folder of the model, in the published layout.

    **Raises:** `TrainingError` where `output` exists already, holds the run of another config, or
    the loss is not finite; `DataError`, `ConfigError`, `SettingError`, `PromptError`, `SourceError`
    or `CheckpointError`.
    """
    if report is None or not is_first():
        report = lambda event, facts: None
    note = lambda message: report("note", {"message": message})
    output, size = Path(output), (config.data.height, config.data.width)
    last = _last_state(output, config, resume)
    wait_for_all()
    check_batch(mesh, config.run.batch_size)
    examples = read_folder(config.data.folder, captions=not config.model.alone)
    images = np.stack([read_image(example.path, *size) for example in examples])
    note(f"{len(examples)} images from {config.data.folder}")
    studio, params = open_studio(config, mesh)
    if studio.vae is None:
        batches = image_batches(config, images)
    else:
        note("encoding the images")
        latents = encode_images(studio.vae, images)
        note("tokenizing the captions")
        batches = latent_batches(studio, config, examples, latents)
    jobs = sample_jobs(studio, config)
    for cut in cuts(jobs):
        note(f"sample.prompts: {cut}")
    axes = matrix_axes(params, studio.blueprint.components, config.optimizer.adam)
    task = Task(
        studio.frozen,
        make_objective(studio, config),
        make_optimizer(config.optimizer, config.run.steps, axes),
        jax.random.key(config.run.seed, impl="threefry2x32"),
        config.optimizer.ema_decay,
        config.run.accumulate,
    )
    state = TrainState.init(params, task.optimizer, ema=config.optimizer.ema_decay > 0)
    del params  # the state has its own copy
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    note(f"{count / 1e6:.2f} M parameters are trained")
    if last is not None:
        state = load_state(last, state)
        note(f"going on from step {int(state.step)}")
    output.mkdir(parents=True, exist_ok=True)
    log = Log(output / LOG, int(state.step))
    whole = lambda state: eqx.combine(state.averaged, studio.frozen)
    shown = images[np.linspace(0, len(images) - 1, config.sample.count).astype(int)]
    show = lambda state: write_samples(studio, jobs, whole(state), shown, output / SAMPLES)
    split = lambda step: shard_batch(batches(step), mesh)
    state = _loop(config, task, state, split, log, output / STATES, report, show)
    modules = whole(state)
    if studio.vae is None:
        modules["vae"] = measured(modules["vae"], images[:1024])
    else:
        modules["vae"] = studio.vae
    write_model(studio, modules, config, output / MODEL)
    report("file", {"path": output / MODEL})
    return output / MODEL


def _last_state(output: Path, config: TrainConfig, resume: bool) -> Path | None:
    """Returns the state to go on from. **Raises:** `TrainingError` rather than mix two runs."""
    states = saved_states(output / STATES)
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise TrainingError(
                f"{output} exists already: give `resume` to go on with the run in it, "
                "or another `output`."
            )
        return None
    if not states:
        if output.exists() and any(path.name != LOG for path in output.iterdir()):
            raise TrainingError(f"{output} holds no run to go on with: it has no {STATES}/step-*.")
        return None
    before, now = read_facts(states[-1]).get("config"), json.loads(json.dumps(config.decisive))
    if before != now:
        raise TrainingError(
            f"{output} is the run of another config, which differs in "
            f"{', '.join(_differences(before, now))}: put them back, or give another `output`."
        )
    return states[-1]


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Lists the keys that differ, such as `optimizer.learning_rate`."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [prefix.rstrip(".")] if before != now else []
    keys = sorted({*before, *now})
    return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{prefix}{k}.")]


def _loop(
    config: TrainConfig,
    task: Task,
    state: TrainState,
    batches: Batches,
    log: "Log",
    states: Path,
    report: Report,
    show: Callable[[TrainState], Path | None],
) -> TrainState:
    """Makes the steps that are left, and logs, saves and shows in between."""
    run = config.run
    first, since, losses, parts = int(state.step), time.monotonic(), [], []
    seconds, images = 0.0, 0
    for step in range(first, run.steps):
        state, loss, metrics = train_step(task, state, batches(step))
        losses.append(loss)
        parts.append(metrics)
        done = step + 1
        if done % run.log_every == 0 or done == run.steps:
            value = float(jnp.mean(jnp.stack(losses)))
            others = {k: float(jnp.mean(jnp.stack([p[k] for p in parts]))) for k in parts[0]}
            now = time.monotonic()
            if done - first > run.log_every:  # the first steps compile
                seconds, images = seconds + now - since, images + len(losses) * run.batch_size
            speed = images / seconds if seconds else len(losses) * run.batch_size / (now - since)
            left = (run.steps - done) * run.batch_size / speed
            facts = {"step": done, "loss": value, **others, "images_per_second": round(speed, 2)}
            log.write(facts)
            report("progress", {**facts, "steps": run.steps, "seconds_left": left})
            if not math.isfinite(value):
                raise TrainingError(
                    f"The loss is not finite after step {done}: lower optimizer.learning_rate or "
                    "optimizer.clip. The last saved state is unchanged."
                )
            losses, parts = [], []
            since = now
        paused = time.monotonic()
        if done % run.save_every == 0 or done == run.steps:
            save_state(states, done, state, {"step": done, "config": config.decisive})
        if run.sample_every and (done % run.sample_every == 0 or done == run.steps):
            path = show(state)
            if path is not None:
                report("file", {"path": path})
        since += time.monotonic() - paused
    return state


@dataclasses.dataclass
class Log:
    """The JSONL file of a run that goes on from `step`: lines of later steps are removed."""

    path: Path
    step: int

    def __post_init__(self):
        if self.path.exists() and is_first():
            kept = [line for line in self.path.read_text().splitlines() if self._before(line)]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def _before(self, line: str) -> bool:
        try:
            return json.loads(line)["step"] <= self.step
        except (ValueError, KeyError):
            return False

    def write(self, facts: Mapping[str, Any]) -> None:
        """Appends a line. **Raises:** `CheckpointError` where it cannot be written."""
        if not is_first():
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "time": round(time.time(), 1)}) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}.") from None
