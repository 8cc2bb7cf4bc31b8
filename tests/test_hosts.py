"""Several processes against one, and what they say when one is late, lost or unlike the others."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import host_worker
import jax
import numpy as np
import pytest
import safetensors.numpy
from command import pixels
from helpers import fake_tensor, relative_error, write_checkpoint
from test_training_run import world as world

from eqxdiff import HostsError, SettingError
from eqxdiff._meeting import free_port, meet
from eqxdiff._watch import differences
from eqxdiff.checkpoint import export_tensors, load_module, read_table
from eqxdiff.distributed import join, versions
from eqxdiff.models import find_model
from eqxdiff.tensors import SafetensorsFile
from eqxdiff.training import read_config, train


WORKER = Path(host_worker.__file__)
STOP_SECONDS = 10
"""The others stop within this time after one is killed."""


def address() -> str:
    return f"127.0.0.1:{free_port()}"


def start(*words: object, devices: int = 1, **environ: str) -> subprocess.Popen:
    """A process that sees so many devices of its own, compiled as little as the tests are."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    fast = str(int(jax.config.read("jax_disable_most_optimizations")))
    extra = {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": fast, **environ}
    return subprocess.Popen(
        [str(word) for word in words],
        env={**os.environ, **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def worker(kind: str, *words: object, **environ: str) -> subprocess.Popen:
    return start(sys.executable, "-u", WORKER, kind, *words, **environ)


def ended(processes) -> list[tuple[str, str]]:
    """What each printed, after all have ended well."""
    printed = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, printed, strict=True):
        assert process.returncode == 0, err[-3000:]
    return printed


# --- they meet, compare notes and notice who is gone: no JAX, no processes


def meeting(*facts: dict, count: int | None = None, timeout: float = 10.0, silence: float = 30.0):
    """Threads that meet as processes do: their watches or errors, and what was lost."""
    where, count = address(), len(facts) if count is None else count
    results: list = [None] * len(facts)
    lost: list = []

    def one(index: int) -> None:
        try:
            results[index], _ = meet(
                where,
                index,
                count,
                facts[index],
                timeout=timeout,
                silence=silence,
                on_loss=lambda message: lost.append((index, message)),
            )
        except HostsError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 10)
    return results, lost


def test_processes_that_are_given_the_same_agree():
    watches, lost = meeting({"`steps`": 4}, {"`steps`": 4}, {"`steps`": 4})
    said: list = [None] * 3

    def one(index):
        said[index] = watches[index].agree({"the weights": "x"}, own=10 + index)
        watches[index].leave()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(3)]
    [thread.start() for thread in threads]
    [thread.join(10) for thread in threads]
    assert said == [10, 10, 10]
    time.sleep(0.2)
    assert not lost


def test_a_difference_is_named_with_its_process():
    versions = {"the version of jax": "0.10.2"}
    results, _ = meeting(
        {**versions, "`steps`": 4}, {**versions, "`steps`": 4}, {**versions, "`steps`": 8}
    )
    wanted = "The processes are not given the same: `steps` is 4 on process 0 and 8 on process 2."
    assert results == [wanted] * 3
    assert "the version of jax is 0.10.2 on process 0 and 0.12.0 on process 1" in differences(
        [versions, {"the version of jax": "0.12.0"}]
    )


def test_a_late_process_is_named_to_all():
    results, _ = meeting({}, {}, count=4, timeout=0.6)
    assert results == ["Processes 2, 3 of 4 did not start within 0.6 s."] * 2


def test_an_unreachable_coordinator_is_an_error_in_time():
    where, began = address(), time.monotonic()
    with pytest.raises(HostsError, match=rf"`coordinator` {where} was not reached within 0.5 s"):
        meet(where, 1, 2, {}, timeout=0.5, silence=5.0)
    assert time.monotonic() - began < 3


def test_wrong_numbers_are_errors():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HostsError, match=r"cannot be used: .*[Aa]ddress already in use"):
            meet(where, 0, 2, {}, timeout=1.0, silence=5.0)
    with pytest.raises(HostsError, match="write HOST:PORT"), join("nowhere", 0, 2):
        pass
    with pytest.raises(HostsError, match="finds no cluster"), join("auto", timeout=1):
        pass
    with pytest.raises(SettingError, match="`process_id` 2 is out of range"), join("a:1", 2, 2):
        pass
    with pytest.raises(SettingError, match="`process_id` would be ignored"), join(None, 2):
        pass


def hello(where: str, **message: object) -> socket.socket:
    """A connection of somebody who says hello by hand."""
    connection = socket.create_connection(where.split(":"), 5)
    connection.sendall(json.dumps(message).encode() + b"\n")
    return connection


def first_of_two(where: str, **more):
    """Process 0 of two in a thread: its end, and the messages of losses with their times."""
    results, lost = [], []

    def one() -> None:
        loss = lambda message: lost.append((message, time.monotonic()))
        try:
            results.append(meet(where, 0, 2, {}, timeout=5.0, on_loss=loss, **more))
        except HostsError as error:
            results.append(str(error))

    thread = threading.Thread(target=one)
    thread.start()
    time.sleep(0.2)
    return thread, results, lost


def test_a_machine_that_falls_silent_is_named():
    where = address()
    thread, results, lost = first_of_two(where, silence=0.6)
    silent = hello(where, process=1, count=2, host="node7")
    began = time.monotonic()
    thread.join(10)
    ((message, when),) = lost
    assert message.startswith("Process 1 on node7 has not been heard of for 0.6 s")
    assert when - began < 3
    assert results == [message]
    silent.close()


@pytest.mark.parametrize(
    ("number", "count", "message"),
    [
        (1, 3, "`num_processes` is 2 on process 0 and 3 on process 1."),
        (0, 2, "Two processes have the `process_id` 0"),
    ],
)
def test_processes_with_wrong_numbers_are_told(number, count, message):
    where = address()
    thread, results, _ = first_of_two(where, silence=5.0)
    with hello(where, process=number, count=count, host="node7") as other:
        assert message in other.makefile().readline()
    thread.join(10)
    assert message in results[0]


def test_other_versions_are_an_error_before_jax_is_started():
    where, errors = address(), []

    def first() -> None:
        try:
            with join(where, 0, 2, timeout=5):
                pass
        except HostsError as error:
            errors.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    time.sleep(0.3)
    with hello(where, process=1, count=2, host="node7") as other:
        facts = {**versions(), "the version of jax": "0.1"}
        other.sendall(json.dumps({"said": facts}).encode() + b"\n")
        thread.join(10)
    now = versions()["the version of jax"]
    assert f"the version of jax is {now} on process 0 and 0.1 on process 1." in errors[0]
    assert not jax.distributed.is_initialized()


# --- real processes


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_of_a_killed_process_stop_and_name_it(killed):
    """Process 0, with which the others have their connections, and another one."""
    where = address()
    processes = [worker("loop", ".", where, index, 3 - killed) for index in range(3 - killed)]
    for process in processes:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("running"):
            assert line, process.communicate()[1][-3000:]
    os.kill(processes[killed].pid, signal.SIGKILL)
    began = time.monotonic()
    name = f"error: Process {killed} on {socket.gethostname()} has ended unexpectedly"
    for process in processes:
        _, err = process.communicate(timeout=60)
        if process is not processes[killed]:
            assert name in err
            assert process.returncode == 1
    assert time.monotonic() - began < STOP_SECONDS


@pytest.fixture(scope="module")
def folder(world):
    """A tiny FLUX, its transformer in the original layout, a LoRA and a config of training."""
    model = write_checkpoint(world / "flux", "flux-dev")
    family, _ = find_model("flux-dev")
    component = family.components["transformer"]
    config = component.parse(json.loads((model / "transformer/config.json").read_text()))
    (weights,) = (model / "transformer").glob("*.safetensors")
    skeleton = component.skeleton(config)
    module = load_module(SafetensorsFile(weights), read_table(component.table), skeleton)
    table, _ = family.files.of("flux-dev").layout["transformer"]
    tensors = dict(export_tensors(module, read_table(table)))
    safetensors.numpy.save_file(tensors, world / "original.safetensors")
    lora = {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"):
        shape = SafetensorsFile(weights).tensors[f"{name}.weight"].shape
        for part, size in (("A", (2, shape[1])), ("B", (shape[0], 2))):
            key = f"transformer.{name}.lora_{part}.weight"
            lora[key] = fake_tensor(key, size, 0.5)
    safetensors.numpy.save_file(lora, world / "lora.safetensors")
    (world / "model").rename(world / "trained")
    toml = world / "flux.toml"
    toml.write_text(toml.read_text().replace(str(world / "model"), str(world / "trained")))
    model.rename(world / "model")
    return world


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes on one device: pictures, latents, and the losses of training."""
    _, pictures = host_worker.make(folder, None)
    train(read_config(folder / "flux.toml"), folder / "run-1")
    return {p.index: p for p in pictures}, losses(folder / "run-1")


def losses(output: Path) -> list[float]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module", params=[2, 4])
def together(request, folder):
    """The facts of each of several processes: two by the options, four by what SLURM says."""
    count, where = request.param, address()
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1"}
    slurm["SLURM_NTASKS"] = str(count)
    processes = []
    for index in range(count):
        if count == 2:
            processes.append(worker("work", folder, where, index, count))
        else:
            one = {**slurm, "SLURM_PROCID": str(index), "SLURM_LOCALID": "0"}
            processes.append(worker("work", folder, "auto", "detected", count, **one))
    ended(processes)
    return count, [json.loads((folder / f"{count}-{i}.json").read_text()) for i in range(count)]


@pytest.mark.slow
def test_several_processes_make_the_same_pictures(folder, alone, together):
    """Each writes its own: the pictures of all processes together are those of one, once each."""
    count, _ = together
    seen: list[int] = []
    for index in range(count):
        for kind, suffix in (("image", ""), ("latent", "-latents")):
            with np.load(folder / f"{count}-{index}{suffix}.npz") as made:
                for name in made:
                    number = int(name.removeprefix(kind))
                    picture = alone[0][number]
                    wanted = picture.array if kind == "image" else picture.latent
                    assert relative_error(made[name], wanted) < 1e-5
                    seen += [number] if kind == "image" else []
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.slow
def test_each_process_reads_the_bytes_of_its_shards_and_no_others(folder, together):
    count, facts = together
    for each in facts:
        own, whole = each["bytes"]["transformer"]
        assert each["counted"][str(folder / "original.safetensors")] == own
        assert own < (0.6 if count == 2 else 0.75) * whole  # half, and what is not split


@pytest.mark.slow
def test_a_lora_is_merged_over_processes_and_weights_are_parked(together):
    for each in together[1]:
        assert together[0] > 2 or each["merged later"] < 1e-6
        assert each["parked"]


@pytest.mark.slow
def test_several_processes_train_with_the_same_losses(folder, alone, together):
    count, facts = together
    for each in facts:
        np.testing.assert_allclose(each["losses"], host_worker.small_losses(None), rtol=2e-6)
    if count > 2:
        return
    np.testing.assert_allclose(losses(folder / f"run-{count}"), alone[1], rtol=2e-5)
    assert (folder / f"run-{count}/model/transformer/config.json").exists()
    one, many = (
        safetensors.numpy.load_file(folder / f"run-{n}/states/step-00000004/state.safetensors")
        for n in (1, count)
    )
    assert one.keys() == many.keys()
    assert all(one[name].shape == many[name].shape for name in one)


@pytest.mark.slow
def test_the_command_runs_in_several_processes(folder, tmp_path):
    """The model that comes with the package; and different arguments are an error at the start."""
    program = Path(sys.executable).with_name("eqxdiff")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "a red heart", "seed": 3}\n{"prompt": "a blue star", "cfg": 2.0}\n'
    )
    words = ["generate", "flux-emoji", "--prompt-file", prompts, "--seed", 5, "--json"]
    words += ["--compile-cache", tmp_path / "cache"]
    where = address()

    def many(*steps: int):
        numbers = ["--num-processes", 2, "--coordinator", where]
        return [
            start(program, *words, *numbers, "--process-id", i, "--steps", n, "--mesh",
                  "data=2,tensor=2", "-o", tmp_path / "many" / "{index}.png", devices=2)
            for i, n in enumerate(steps)
        ]  # fmt: skip

    for process in many(2, 3):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (1, "")
        message = json.loads(err.splitlines()[-1])["message"]
        assert "--steps is 2 on process 0 and 3 on process 1." in message
    alone = start(program, *words, "--steps", 2, "-o", tmp_path / "one" / "{index}.png")
    ended([alone])
    files = [json.loads(out)["files"] for out, _ in ended(many(2, 2))]
    assert [len(each) for each in files] == [1, 1]
    for index in range(2):
        made, wanted = (pixels(tmp_path / f"{k}/{index}.png") for k in ("many", "one"))
        assert np.abs(made - wanted).max() <= 1
    assert re.fullmatch(r"\d\.png", Path(files[0][0]).name)
