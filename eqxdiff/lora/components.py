"""The components of a model that adapters can change, and what their families know of them."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from ..checkpoint import Table, read_table
from ..checkpoint.load import dotted, is_leaf
from ..checkpoint.plan import Move
from ..checkpoint.table import TableFile
from ..models import Component, LoraNames, families as known_families
from ..passes import published


WHOLE = "model"
"""The name of a model that has no component of any family."""


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedComponent:
    """A component found in a model.

    **Fields:**

    - `name`, `path`: its name, and its place in the model as JAX's keys.
    - `module`: the component itself in the checkpoint's order, or its skeleton.
    - `tables`: the key tables of its published layouts.
    - `prefixes`: the prefixes that families list for it.
    """

    name: str
    path: tuple[Any, ...]
    module: Any
    tables: tuple[Table, ...]
    prefixes: tuple[str, ...]

    def depth(self, leaf: str) -> int | None:
        """Returns the number of segments of a path before the layer's index; `None`: no stack."""
        return self.tables[0].stack_depth_at(leaf) if self.tables else None

    def layer_path(self, move: Move) -> str:
        """Returns the path of the layer that a move fills a part of: `blocks.7.attn.to_q`."""
        return path_of(move.leaf, self.depth(move.leaf), move.layer).rpartition(".")[0]

    def skeleton(self) -> "AdaptedComponent":
        """Returns the same component with shapes in place of its arrays."""
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_leaf(x) else x
        return dataclasses.replace(self, module=jax.tree.map(shape, self.module))


@dataclasses.dataclass(frozen=True)
class _Known:
    """A component of a family."""

    cls: type
    name: str
    layouts: tuple[TableFile, ...]
    prefixes: tuple[str, ...]


@runtime_checkable
class NamedFamily(Protocol):
    """The part of a family that adapters need."""

    @property
    def components(self) -> Mapping[str, Component]: ...

    @property
    def lora(self) -> LoraNames: ...


def every_family(families: Sequence[NamedFamily] | None = None) -> Sequence[NamedFamily]:
    """Returns the given families, or all that there are."""
    return known_families() if families is None else families


def _known(families: Sequence[NamedFamily]) -> Iterator[_Known]:
    for family in families:
        for name, component in family.components.items():
            if inspect.ismethod(component.init) and isinstance(component.init.__self__, type):
                listed = family.lora.prefixes.get(name, ())
                yield _Known(
                    component.init.__self__,
                    name,
                    tuple(form.table for form in component.forms),
                    listed,
                )


def find_components(
    model: Any,
    tables: Sequence[Table] | None = None,
    families: Sequence[NamedFamily] | None = None,
) -> list[AdaptedComponent]:
    """Finds the components in a PyTree: a pipeline, a dictionary of modules, or one module.

    A model without any component of a family is one component, called `model`. Its modules may
    have any prefix that a family lists.

    **Arguments:**

    - `tables`: the layouts of a model of no known family. Without them the names of its modules
        are their own paths.
    - `families`: the families to look for; all by default.
    """
    families = every_family(families)
    known = list(_known(families))
    classes = tuple(entry.cls for entry in known)
    is_component = lambda node: isinstance(node, classes)
    found = []
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_component)[0]
    for path, node in flat if tables is None else ():
        if not is_component(node):
            continue
        fits = [entry for entry in known if isinstance(node, entry.cls)]
        name = dotted(path[-1:]) if path else fits[0].name
        named = [entry for entry in fits if entry.name == name] or fits[:1]
        prefixes = dict.fromkeys(text for entry in named for text in entry.prefixes)
        layouts = tuple(map(read_table, named[0].layouts))
        found.append(AdaptedComponent(name, path, published(node), layouts, tuple(prefixes)))
    if found:
        return found
    prefixes = [
        text for family in families for texts in family.lora.prefixes.values() for text in texts
    ]
    names = [f"{name}." for family in families for name in family.components]
    listed = dict.fromkeys((*prefixes, *(f"{n}base_model.model." for n in names), *names))
    return [AdaptedComponent(WHOLE, (), published(model), tuple(tables or ()), tuple(listed))]


def follow(tree: Any, path: Sequence[Any]) -> Any:
    """Returns the node at a path, given as JAX's keys or as the segments of a dotted path."""
    for key in path:
        match key:
            case jax.tree_util.GetAttrKey(name=name):
                tree = getattr(tree, name)
            case jax.tree_util.SequenceKey(idx=index):
                tree = tree[index]
            case jax.tree_util.DictKey(key=name):
                tree = tree[name]
            case str() if isinstance(tree, tuple | list):
                tree = tree[int(key)]
            case str() if isinstance(tree, dict):
                tree = tree[key]
            case str():
                tree = getattr(tree, key)
            case _:
                raise TypeError(f"{key!r} is no step of a path")
    return tree


def path_of(leaf: str, depth: int | None, layer: int | None) -> str:
    """Returns a leaf's path with the layer's index in its place."""
    if depth is None or layer is None:
        return leaf
    segments = leaf.split(".")
    return ".".join([*segments[:depth], str(layer), *segments[depth:]])
