"""A model whose configs and tokenizers are read, and whose weights are not."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
from jax.sharding import Mesh, Sharding

from .._dtypes import float32_products
from .._errors import SettingError
from ..checkpoint import FILE, Table, leaf_paths, load_module, loaded_shapes
from ..convert import locate
from ..hub import Part, Source
from ..kernels import AttentionChoice, attending
from ..lora import Fitted, Merger, apply_fitted
from ..models import AbstractModel, Component, Family, References, Settings, own_names
from ..passes import fast
from ..sharding import on_mesh, parameter_sharding
from ..tensors import AbstractTensorSource
from ..text import Tokenizer


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """All of a model but its weights.

    Two blueprints are equal where the same programs run their models, so that `jax.tree.map` works
    over two loads of a model, and what was compiled for one serves the other.

    **Fields:**

    - `model`: the family bound to the configs.
    - `source`: where the files are.
    - `configs`: of each component, of the `"scheduler"` and of the `"pipeline"`.
    - `tokenizers`: by folder name.
    - `dtype`: of the weights; `None` keeps the dtype of each tensor of the checkpoint.
    - `compute_dtype`: of the activations.
    - `mesh`: the devices to spread over, or `None` for the default one.
    - `attention`: the backends of attention, on these devices.
    - `components`: those of the family and the ControlNets, by name.
    - `parts`: where the weights of components are that are not the source's own.
    - `made_for`: the number of steps that the weights are made for, if there is one.
    - `note`: what a single file of weights lacks, and where that comes from instead.
    - `fast`: whether the weights are in the order that computes fastest rather than in the
        checkpoint's (`eqxdiff.passes`).
    - `adapters`: LoRAs, and whether they are `merged` rather than applied at run time.
    """

    model: AbstractModel
    family: Family
    source: Source
    configs: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]
    dtype: Any
    compute_dtype: Any
    mesh: Mesh | None
    attention: AttentionChoice
    components: Mapping[str, Component]
    parts: Mapping[str, Part]
    made_for: int | None
    note: str | None = None
    fast: bool = False
    adapters: Fitted | None = None
    merged: bool = True

    @property
    def _programs(self) -> tuple[Any, ...]:
        """What the programs of a model depend on."""
        components = tuple(self.components)
        return self.model, self.compute_dtype, self.mesh, self.attention, components

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blueprint) and self._programs == other._programs

    def __hash__(self) -> int:
        return hash(self._programs)

    @contextlib.contextmanager
    def computing(self) -> Iterator[dict[str, str]]:
        """Puts precision, attention and mesh of the model in place for what is traced within.

        **Yields:** a dictionary that is filled meanwhile: the backend of each shape of attention.
        """
        precision, devices = float32_products(self.compute_dtype), on_mesh(self.mesh)
        with precision, devices, attending(self.attention) as used:
            yield used

    @property
    def name(self) -> str:
        """The name that users call the model by, such as `"flux-dev"`."""
        return self.model.name

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these weights from others."""
        parts = {name: dict(part.identity) for name, part in self.parts.items()}
        return {**self.source.identity, **({"parts": parts} if parts else {})}

    @property
    def controlnets(self) -> int:
        """The number of ControlNets."""
        return len(self.components) - len(self.family.components)

    @property
    def references(self) -> References | None:
        """Which reference pictures the model takes, if it takes any."""
        return self.family.references(self.configs)

    def names(self, stage: str) -> list[str]:
        """Names the components of a stage: `"text"`, `"denoiser"` or `"vae"`."""
        return [name for name, part in self.components.items() if part.stage == stage]

    def resolve(self, given: Mapping[str, Any]) -> Any:
        """Completes the settings that a user gave. **Raises:** `SettingError`."""
        settings: Settings = self.model.resolve(own_names(self.family.settings, given))
        if self.made_for not in (None, settings.steps):
            raise SettingError(
                f"These weights of {self.name} are made for {self.made_for} steps: load the model "
                f"with `steps` {settings.steps} for others."
            )
        return settings

    def load(self, names: Sequence[str], *, progress: Progress | None = None) -> dict[str, Any]:
        """Loads components by name. **Raises:** `CheckpointError`, `SourceError`."""
        load = lambda name: self._load_component(name, progress)
        if not self.fast:
            return {name: load(name) for name in names}
        return {name: fast(load(name), donate=True) for name in names}

    def shapes(self, name: str) -> Any:
        """Returns the shapes and dtypes of a component as it would be loaded.

        Of the files nothing but headers is read. **Raises:** `CheckpointError`, `SourceError`.
        """
        tensors, table, skeleton, dtype = self._files(name)
        module = loaded_shapes(tensors, table, skeleton, dtype=dtype, name=name)
        if self.adapters is not None and not self.merged:
            module = eqx.filter_eval_shape(apply_fitted, {name: module}, self.adapters)[name]
        return eqx.filter_eval_shape(fast, module) if self.fast else module

    def nbytes(self, name: str) -> int:
        """Returns the bytes of a component's tensors, from the headers of its files."""
        tensors, _, skeleton, _ = self._files(name)
        if self.dtype is None:
            return sum(info.nbytes for info in tensors.tensors.values())
        leaves = leaf_paths(skeleton).values()
        return sum(leaf.size for leaf in leaves) * self.dtype.itemsize

    def _files(self, name: str) -> tuple[AbstractTensorSource, Table, Any, Any]:
        """Returns the tensors of a component, their table, its skeleton and the wanted dtype."""
        component, part = self.components[name], self.parts.get(name)
        tensors = self.source.tensors(name) if part is None else part.tensors()
        skeleton = component.skeleton(self.configs[name])
        dtype = FILE if self.dtype is None else self.dtype
        return *locate(tensors, component.table, skeleton), skeleton, dtype

    def _load_component(self, name: str, progress: Progress | None) -> Any:
        component = self.components[name]
        report = None if progress is None else partial(progress, f"loading {name}")
        tensors, table, skeleton, dtype = self._files(name)

        def sharding(path: str, shape: tuple[int, ...]) -> Sharding | None:
            if self.mesh is None:
                return None
            return parameter_sharding(path, shape, component.rules, self.mesh)

        merger = None
        if self.adapters is not None and self.merged:
            merger = Merger(self.adapters, name)
        module = load_module(
            tensors,
            table,
            skeleton,
            dtype=dtype,
            sharding=sharding,
            name=name,
            progress=report,
            change=None if merger is None else merger.change,
        )
        if self.adapters is None:
            return module
        if merger is not None:
            return merger.finish(module)
        return apply_fitted({name: module}, self.adapters)[name]
