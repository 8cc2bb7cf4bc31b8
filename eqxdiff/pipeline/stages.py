"""The stages of a model, text, denoiser and autoencoder: loaded, parked and dropped."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import equinox as eqx
import jax

from ..distributed import ParkedArray
from ..models import Modules
from .blueprint import Blueprint, Progress
from .pipeline import Pipeline
from .programs import Programs


Keep = Literal["device", "host", "nowhere"]
"""Where the text encoders are while pictures are sampled."""

Clock = Callable[[str], AbstractContextManager[None]]
"""Measures the time of a `with` block: `"load"`, `"encode"` or `"images"`."""


class AbstractStages(abc.ABC):
    """Gives the components of each stage when they are needed.

    - `blueprint`: of the model.
    - `ahead`: whether all prompts are encoded before the first picture is sampled.
    - `clock`: measures what takes how long.
    - `programs`: run the networks.
    - `attention`: the backend of each shape of attention that has run.
    """

    blueprint: Blueprint
    ahead: bool
    clock: Clock
    programs: Programs
    attention: dict[str, str]

    @abc.abstractmethod
    def text(self, *, last: bool) -> AbstractContextManager[Modules]:
        """Gives the text encoders to a `with` block; after the `last` they need not come back."""

    @abc.abstractmethod
    def modules(self, stage: str) -> dict[str, Any]:
        """Returns the components of another stage."""

    @abc.abstractmethod
    def release(self, stage: str, needed: Modules) -> None:
        """Frees the arrays of a stage that are not among those `needed`, where memory is scarce.

        `modules` brings them back.
        """


class LoadedStages(AbstractStages):
    """The stages of a pipeline, all of which stay where they are."""

    def __init__(self, pipe: Pipeline):
        self.blueprint, self.ahead, self.clock = pipe.blueprint, False, no_clock
        self.attention = {}
        self.programs, self._pipe = Programs(), pipe

    @contextlib.contextmanager
    def text(self, *, last: bool) -> Iterator[Modules]:
        yield self._pipe.stage("text")

    def modules(self, stage: str) -> dict[str, Any]:
        return self._pipe.stage(stage)

    def release(self, stage: str, needed: Modules) -> None:
        pass


class Stages(AbstractStages):
    """Loads each stage when it is first needed, and keeps the text encoders where it is told.

    - `dtypes`: of the weights of each component that has been loaded.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        keep: Keep = "device",
        *,
        progress: Progress | None = None,
        clock: Clock | None = None,
        programs: Programs | None = None,
    ):
        """**Arguments:**

        - `keep`: where the text encoders go when they are not needed for the moment. `"nowhere"`
            encodes all prompts first and then drops them.
        - `progress`: is told what is loaded.
        - `clock`: measures the time to `"load"`, to `"encode"` and to make the `"images"`.
        - `programs`: run the networks; by default those that JAX traces and compiles.
        """
        self.blueprint, self.ahead = blueprint, keep == "nowhere"
        self.clock = no_clock if clock is None else clock
        self.programs = programs or Programs()
        self.dtypes: dict[str, str] = {}
        self.attention = {}
        self._keep, self._progress = keep, progress
        self._loaded: dict[str, dict[str, Any] | Parked] = {}

    @contextlib.contextmanager
    def text(self, *, last: bool) -> Iterator[Modules]:
        modules = self.modules("text")
        yield modules
        if self._keep != "device":
            del self._loaded["text"]
            if not last:
                self._loaded["text"] = Parked(modules)

    def modules(self, stage: str) -> dict[str, Any]:
        modules = self._loaded.get(stage)
        if modules is None:
            with self.clock("load"):
                names = self.blueprint.names(stage)
                modules = self.blueprint.load(names, progress=self._progress)
            self.dtypes |= dtypes_of(modules)
        elif isinstance(modules, Parked):
            modules = modules.back()
        self._loaded[stage] = modules
        return modules

    def release(self, stage: str, needed: Modules) -> None:
        modules = self._loaded[stage]
        if self._keep != "device" and not isinstance(modules, Parked):
            self._loaded[stage] = Parked(modules, needed)


class Parked:
    """Modules in host memory. Those on the device are freed with the last reference to them.

    Arrays that are needed meanwhile stay on the device.
    """

    def __init__(self, modules: Mapping[str, Any], needed: Modules | None = None):
        kept = set(map(id, jax.tree.leaves(needed)))
        goes = lambda leaf: eqx.is_array(leaf) and id(leaf) not in kept
        arrays, self._rest = eqx.partition(dict(modules), goes)
        self._arrays = jax.tree.map(ParkedArray, arrays)

    def back(self) -> dict[str, Any]:
        """Returns the modules on the device again."""
        arrays = jax.tree.map(lambda parked: parked.back(), self._arrays)
        return eqx.combine(arrays, self._rest)


def dtypes_of(modules: Mapping[str, Any]) -> dict[str, str]:
    """Names the dtypes of the weights of each component, the most frequent first."""
    names = {}
    for name, module in modules.items():
        sizes: dict[str, int] = {}
        for leaf in jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array)):
            sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
        names[name] = ", ".join(sorted(sizes, key=lambda dtype: -sizes[dtype]))
    return names


@contextlib.contextmanager
def no_clock(what: str) -> Iterator[None]:
    """Measures nothing."""
    yield


def stages_of(source: Pipeline | AbstractStages) -> AbstractStages:
    """Returns the stages of a loaded pipeline, or stages as they are."""
    return LoadedStages(source) if isinstance(source, Pipeline) else source
