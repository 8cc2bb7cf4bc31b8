"""Many processes, perhaps on many machines, that run one program on one mesh.

Each process sees the devices of all, reads only what its own devices hold of the weights, and gets
the pictures that its own devices hold. `join` brings the processes together; the rest is the same
program on every one of them.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ._errors import EqxdiffError, HostsError, SettingError
from ._meeting import free_port, meet, split_address
from ._watch import Watch, end_process


START_SECONDS = 300.0
"""How long the processes wait for each other at the start, by default."""

SILENCE_SECONDS = 60.0
"""After how long a machine that is gone counts as lost. A process that ends is noticed at once."""

NEWS_SECONDS = 5.0
AUTO = "auto"


class Hosts:
    """The processes of this program: one, or those that `join` brought together.

    - `index`, `count`: the number of this process, and how many there are.
    """

    def __init__(self, watch: Watch | None = None):
        self.index, self.count = (0, 1) if watch is None else (watch.process, watch.count)
        self._watch = watch

    def agree(self, facts: Mapping[str, Any], own: Any = None) -> Any:
        """Waits for all processes and compares facts: see `Watch.agree`."""
        return own if self._watch is None else self._watch.agree(facts, own)


@contextlib.contextmanager
def join(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    timeout: float = START_SECONDS,
    silence: float = SILENCE_SECONDS,
    on_loss: Callable[[str], None] = end_process,
) -> Iterator[Hosts]:
    """Joins the processes of a program, which from then on see the devices of all.

    It comes before anything that makes JAX look for devices. The processes meet at `coordinator`
    before JAX is started, so that a late process, an address that nobody answers and versions or
    arguments that differ are errors in words. Within the block they watch each other: where one
    ends, the others stop at once, and where a machine is silent, after `silence` seconds.

    **Arguments:**

    - `coordinator`: `HOST:PORT` of process 0, or `"auto"` for the address, numbers and devices that
        JAX detects: on TPU pods, SLURM, Kubernetes and Open MPI. `None` joins nothing.
    - `process_id`, `num_processes`: which process of how many; detected where they are absent.
    - `facts`: by name, what must be the same on all processes, besides the versions.
    - `timeout`: the seconds that the processes wait for each other at the start.
    - `on_loss`: called in another thread with a message when a process is lost; by default it
        prints the message and ends this process with status 1.

    **Raises:** `HostsError`.
    """
    if coordinator is None:
        for name, value in (("process_id", process_id), ("num_processes", num_processes)):
            if value is not None:
                raise SettingError(f"`{name}` would be ignored without `coordinator`.")
        yield Hosts()
        return
    address, count, index, devices = _detect(coordinator, num_processes, process_id, timeout)
    if not 0 <= index < count:
        raise SettingError(f"`process_id` {index} is out of range: it is from 0 to {count - 1}.")
    if jax.distributed.is_initialized():
        raise HostsError("JAX is started for several processes already: join them only once.")
    host, port = split_address(address)[0], free_port() if index == 0 else None
    watch, port = meet(
        address,
        index,
        count,
        {**versions(), **(facts or {})},
        own=port,
        timeout=timeout,
        silence=silence,
        on_loss=on_loss,
    )
    try:
        host = f"[{host}]" if ":" in host else host
        jax.distributed.initialize(f"{host}:{port}", count, index, devices)
        yield Hosts(watch)
        watch.agree({})
    except HostsError:
        raise
    except EqxdiffError as error:
        watch.fail(str(error))
        raise
    except Exception as error:
        watch.wait_for_news(NEWS_SECONDS)  # perhaps another process is gone, and caused it
        watch.fail(f"{type(error).__name__}: {error}")
        raise
    except BaseException:  # the user, or a scheduler, ends it
        watch.fail("it was interrupted.")
        raise
    watch.leave()
    jax.distributed.shutdown()


def versions() -> dict[str, str]:
    """Returns the versions that must be the same on all processes."""
    names = ("eqxdiff", "jax", "jaxlib")
    return {f"the version of {name}": importlib.metadata.version(name) for name in names}


def _detect(
    coordinator: str, count: int | None, index: int | None, timeout: float
) -> tuple[str, int, int, Any]:
    """Completes the address, the numbers and the devices by what JAX detects of the cluster."""
    address = None if coordinator == AUTO else coordinator
    if address is not None and count is not None and index is not None:
        return address, count, index, None
    try:
        # JAX detects in public only while it connects, where a late process ends all with a failed
        # check and not with an error.
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        found = detect(address, count, index, None, None, int(timeout))
    except Exception as error:
        raise HostsError(
            f"JAX could not find out about the cluster ({error}): give `coordinator`, "
            "`num_processes` and `process_id`."
        ) from None
    address, count, index, devices = found
    missing = [
        f"`{name}`"
        for name, value in zip(("coordinator", "num_processes", "process_id"), found, strict=False)
        if value is None
    ]
    if address is None or count is None or index is None:
        raise HostsError(
            f"JAX finds no cluster that says {', '.join(missing)}: give it, "
            "or run under SLURM, Kubernetes, Open MPI or on a TPU pod."
        )
    return address, count, index, devices


def is_first() -> bool:
    """Tells whether this process writes what there is to write once."""
    return jax.process_index() == 0


def to_host(array: Any) -> np.ndarray:
    """Returns all of an array on every process, which must all call this in the same order."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if isinstance(array.sharding, NamedSharding):  # one program for all arrays of a shape
            array = reshard(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
        if not array.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def put_like(array: np.ndarray, old: Any) -> jax.Array:
    """Puts an array that every process has where another one of its shape is."""
    if not isinstance(old, jax.Array) or not old.committed:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, old.sharding, lambda index: array[index])


def wait_for_all() -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("eqxdiff")


def gather_rows(rows: Mapping[int, np.ndarray], count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Gives every process the float32 rows that each process has some of."""
    whole = np.zeros((count, *shape), np.float32)
    for index, row in rows.items():
        whole[index] = row
    if jax.process_count() == 1:
        return whole
    return np.sum(multihost_utils.process_allgather(whole), axis=0)


def reshard(tree: Any, sharding: Sharding) -> Any:
    """Spreads arrays over devices; of several processes each calls this.

    Arrays of one process alone must be the same on every process.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(tree, jax.Array) and tree.sharding.is_equivalent_to(sharding, tree.ndim):
        return tree
    return _reshard(tree, sharding)  # device_put would refuse the keys of random numbers


@partial(jax.jit, static_argnames="sharding")
def _reshard(tree: Any, sharding: Sharding) -> Any:
    return jax.lax.with_sharding_constraint(tree, sharding)


def own_rows(array: jax.Array, mesh: Mesh | None, axes: tuple[str, ...]) -> dict[int, np.ndarray]:
    """Returns the rows of a batch that belong to this process; each belongs to exactly one.

    **Arguments:**

    - `axes`: the axes of the mesh that split the rows.
    """
    if mesh is None or array.is_fully_addressable:
        return dict(enumerate(np.asarray(array)))
    array = reshard(array, NamedSharding(mesh, PartitionSpec(axes)))
    rows = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            first = shard.index[0].start or 0
            rows |= {first + k: row for k, row in enumerate(np.asarray(shard.data))}
    return rows


class ParkedArray:
    """An array in host memory: of each process, the parts that its devices hold."""

    def __init__(self, array: jax.Array):
        # An array that was put nowhere in particular goes back there, or all is compiled anew.
        self._place = array.sharding if array.committed else None
        self._shape = array.shape
        if self._place is None:
            self._parts = {(): np.asarray(array)}
        else:
            shards = array.addressable_shards
            distinct = {_bounds(shard.index): shard for shard in shards}
            self._parts = {index: np.asarray(shard.data) for index, shard in distinct.items()}

    def back(self) -> jax.Array:
        """Returns the array on its devices again."""
        if self._place is None:
            return jax.device_put(self._parts[()])
        find = lambda index: self._parts[_bounds(index)]
        return jax.make_array_from_callback(self._shape, self._place, find)


def _bounds(index: tuple[slice, ...]) -> tuple[Any, ...]:
    return tuple((part.start, part.stop) for part in index)
