"""One process of several that `test_hosts.py` starts. It imports nothing of pytest."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from eqxdiff.distributed import join
from eqxdiff.tensors.raw import RawFile


MESHES = {2: {"fsdp": 2}, 4: {"data": 2, "tensor": 2}}
PROMPTS = ("a cat", "a much longer prompt about a dog", "a house")
GIVEN = {"height": 32, "width": 32, "steps": 2, "max_sequence_length": 16}


def make(folder: Path, mesh):
    """The pictures of three prompts, in batches of two, and the pipeline."""
    import eqxdiff
    from eqxdiff.pipeline import expand, generate_each

    pipe = eqxdiff.load(
        "flux-dev",
        str(folder / "model"),
        parts={"transformer": str(folder / "original.safetensors")},
        loras=[str(folder / "lora.safetensors")],
        mesh=mesh,
    )
    requests = expand(PROMPTS, seed=7, num_images=1, given=GIVEN)
    return pipe, list(generate_each(pipe, requests, batch_size=2))


def count_reads() -> dict[str, int]:
    """Counts the bytes of tensors that are read, by the name of the file."""
    counted: dict[str, int] = {}
    lock, local = threading.Lock(), threading.local()
    read, fill = RawFile.read, RawFile.fill

    def counting_read(self, *arguments):
        local.tensor = True
        read(self, *arguments)
        local.tensor = False

    def counting_fill(self, offset, out):
        if getattr(local, "tensor", False):
            with lock:
                counted[self.name] = counted.get(self.name, 0) + out.nbytes
        fill(self, offset, out)

    RawFile.read, RawFile.fill = counting_read, counting_fill
    return counted


def own_bytes(module) -> tuple[int, int]:
    """The bytes of the parts of a module that this process holds, and of all of it."""
    own = whole = 0
    for leaf in jax.tree.leaves(module):
        shards = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        own, whole = own + sum(shards.values()), whole + leaf.nbytes
    return own, whole


def merged_later(folder: Path, mesh, pipe) -> float:
    """The largest difference between a LoRA merged while loading and one merged after it."""
    import eqxdiff

    blueprint = eqxdiff.open_model("flux-dev", str(folder / "model"), mesh=mesh)
    module = eqxdiff.lora.merge(
        blueprint.load(["transformer"]), [str(folder / "lora.safetensors")]
    )["transformer"]
    pairs = zip(jax.tree.leaves(module), jax.tree.leaves(pipe["transformer"]), strict=True)
    return max(
        float(np.abs(np.asarray(a.data) - np.asarray(b.data)).max())
        for one, other in pairs
        for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True)
    )


def small_losses(mesh) -> list[float]:
    """The losses of three steps of a small network on a batch that is split over the mesh."""
    import equinox as eqx
    import jax.numpy as jnp
    import optax

    from eqxdiff.sharding import shard_batch
    from eqxdiff.training import Task, TrainState, train_step

    def loss(model, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
        error = jnp.square(jax.vmap(model)(batch + noise) - batch)
        return error.mean(), {}

    model = eqx.nn.MLP(8, 8, 16, 1, key=jax.random.key(0))
    params, frozen = eqx.partition(model, eqx.is_inexact_array)
    task = Task(frozen, loss, optax.adam(1e-2), jax.random.key(1))
    state, losses = TrainState.init(params, task.optimizer, ema=True), []
    for step in range(3):
        batch = jax.random.normal(jax.random.key(step), (8, 8))
        state, value, _ = train_step(task, state, shard_batch(batch, mesh))
        losses.append(float(value))
    return losses


def work(folder: Path, coordinator: str, index: int | None, count: int) -> None:
    with join(coordinator, index, None if index is None else count, timeout=120) as hosts:
        from eqxdiff.pipeline.stages import Parked
        from eqxdiff.sharding import make_mesh
        from eqxdiff.training import read_config, train

        counted = count_reads()
        mesh = make_mesh(**MESHES[count])
        pipe, pictures = make(folder, mesh)
        facts = {"counted": counted, "bytes": {k: own_bytes(m) for k, m in pipe.components.items()}}
        if count == 2:
            facts["merged later"] = merged_later(folder, mesh, pipe)
        parked = Parked(pipe.components).back()
        facts["parked"] = all(
            np.array_equal(np.asarray(x.addressable_data(0)), np.asarray(y.addressable_data(0)))
            for x, y in zip(jax.tree.leaves(parked), jax.tree.leaves(pipe.components), strict=True)
        )
        out = folder / f"{count}-{hosts.index}"
        np.savez(f"{out}.npz", **{f"image{p.index}": p.array for p in pictures})
        np.savez(f"{out}-latents.npz", **{f"latent{p.index}": p.latent for p in pictures})
        facts["losses"] = small_losses(make_mesh(data=count))
        if count == 2:
            config = read_config(folder / "flux.toml")
            train(config, folder / f"run-{count}", mesh=make_mesh(data=count))
        Path(f"{out}.json").write_text(json.dumps(facts))


def loop(coordinator: str, index: int, count: int) -> None:
    """Exchanges numbers for ever, as a program that waits for the others all the time does."""
    with join(coordinator, index, count, timeout=120):
        from jax.experimental.multihost_utils import process_allgather

        for step in range(10**9):
            process_allgather(np.array([step]))
            if step == 2:
                print("running", os.getpid(), flush=True)
            time.sleep(0.02)


if __name__ == "__main__":
    kind, where, coordinator, index, count = sys.argv[1:]
    number = None if index == "detected" else int(index)
    if kind == "loop":
        loop(coordinator, int(index), int(count))
    else:
        work(Path(where), coordinator, number, int(count))
