"""Encode, sample, decode: the weights of each stage where and while they are wanted."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import numpy as np

from eqxdiff.pipeline import Blueprint, ControlImage, Encoded, Picture, Pipeline, generate_each

from .cache import Clock
from .progress import AbstractReport


T = TypeVar("T")

Keep = Literal["device", "host", "nowhere"]
"""Where the text encoders are while images are sampled."""


class Maker:
    """Loads a model stage by stage and makes pictures with it.

    **Fields:**

    - `dtypes`: of the weights of each component that has been loaded.
    """

    def __init__(self, plan: Blueprint, keep: Keep, clock: Clock, report: AbstractReport):
        """**Arguments:**

        - `keep`: where the text encoders go when they are not needed for the moment.
        - `clock`: is told the time to `"load"`, to `"encode"` and to make `"images"`.
        """
        self._plan, self._keep, self._clock, self._report = plan, keep, clock, report
        self._text: dict[str, Any] | Parked = {}
        self._pipe: Pipeline | None = None
        self.dtypes: dict[str, str] = {}

    def pictures(
        self,
        prompts: Sequence[str],
        given: Mapping[str, Any],
        *,
        seed: int,
        num_images: int,
        batch_size: int,
        noise: np.ndarray | None,
        controls: Sequence[ControlImage] = (),
    ) -> Iterator[Picture]:
        """Each picture as its batch is done.

        Prompts are encoded as they are needed, by whole batches; all of them first where the
        encoders are to go nowhere.

        **Arguments:** as of `eqxdiff.generate`. `given` are the settings.
        """
        settings = self._plan.resolve(given)
        size = len(prompts)
        if self._keep != "nowhere":
            size = batch_size // math.gcd(batch_size, num_images)
        steps = -(-len(prompts) * num_images // batch_size) * settings.steps
        done = 0

        def progress(what: str, now: int, total: int) -> None:
            self._report.progress(what, done + now, steps)

        for first in range(0, len(prompts), size):
            group = prompts[first : first + size]
            encoded = self._encode(group, given, last=first + size >= len(prompts))
            self._report.progress("encoding", first + len(group), len(prompts))
            if self._pipe is None:
                names = [*self._plan.names("denoiser"), *self._plan.names("vae")]
                self._pipe = Pipeline(self._load(names), self._plan)
            yield from self._timed(
                generate_each(
                    self._pipe,
                    encoded,
                    settings,
                    seed=seed,
                    num_images=num_images,
                    batch_size=batch_size,
                    noise=None
                    if noise is None
                    else noise[first * num_images :][: len(group) * num_images],
                    controls=controls,
                    progress=progress,
                )
            )
            done += -(-len(group) * num_images // batch_size) * settings.steps

    def _load(self, names: Sequence[str]) -> dict[str, Any]:
        with self._clock("load"):
            modules = self._plan.load(names, progress=self._report.progress)
        for name, module in modules.items():
            leaves = jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array))
            self.dtypes[name] = str(leaves[0].dtype)
        return modules

    def _encode(self, prompts: Sequence[str], given: Mapping[str, Any], *, last: bool) -> Encoded:
        if not self._text:
            self._text = self._load(self._plan.names("text"))
        with self._clock("encode"):
            modules = self._text.back() if isinstance(self._text, Parked) else self._text
            encoded = Pipeline(modules, self._plan).encode(prompts, **given)
            jax.block_until_ready(jax.tree.leaves(encoded))
            if self._keep != "device":
                self._text = {} if last else Parked(modules)
        return encoded

    def _timed(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            with self._clock("images"):
                item = next(items, None)
            if item is None:
                return
            yield item


class Parked:
    """Modules in host memory. That on the device is freed with the last reference to it."""

    def __init__(self, modules: dict[str, Any]):
        arrays, self._rest = eqx.partition(modules, eqx.is_array)
        self._arrays = jax.tree.map(np.asarray, arrays)
        # an array that was put nowhere in particular goes back there, or all is compiled anew
        self._places = jax.tree.map(lambda x: x.sharding if x.committed else None, arrays)

    def back(self) -> dict[str, Any]:
        """The modules on the device again."""
        arrays, structure = jax.tree.flatten(self._arrays)
        places = structure.flatten_up_to(self._places)
        arrays = [jax.device_put(*pair) for pair in zip(arrays, places, strict=True)]
        return eqx.combine(jax.tree.unflatten(structure, arrays), self._rest)
