"""Where parameters, batches and activations live: logical axes -> the axes of a mesh of devices.

A family's rules name the logical axes of each parameter; `MESH_AXES` maps those, and the axes of
activations, onto the axes of a mesh. The leading axis of stacked blocks is `"layers"` and is never
split. What is traced within `on_mesh` finds the mesh by `current_mesh`.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from ._errors import SettingError
from .distributed import reshard


Axes = tuple[str | None, ...]
Rule = tuple[str, Axes]
"""A regular expression for the whole dotted path of a parameter, and its trailing logical axes."""

AXES = ("cfg", "data", "fsdp", "context", "tensor")
"""The axes of a mesh: the conditions of guidance, pictures, pictures whose weights are split and
gathered as used, rows and tokens of a picture, and heads and hidden features."""

_PLACES = ("data", "cfg", "fsdp", "context", "tensor")  # far to near: neighbours talk the most

BATCH_AXES = ("data", "fsdp")
"""The mesh axes that split a batch of images: weights sharded over `fsdp` are gathered as used."""

MESH_AXES: Mapping[str, str | None] = {
    "embed": "fsdp",
    "hidden": "tensor",
    "vocab": None,
    "layers": None,
    "roles": "cfg",
    "rows": "context",
    "tokens": "context",
}
"""Which mesh axis splits each logical axis."""


def make_mesh(
    *,
    cfg: int = 1,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Makes a mesh of the first `cfg * data * fsdp * context * tensor` devices.

    **Arguments:** the size of each axis of `AXES`. One may be -1: all devices that remain.

    - `devices`: by default all of JAX's.

    **Raises:** `SettingError` where a size is out of range, or the devices do not suffice.
    """
    sizes = {"cfg": cfg, "data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    all_of = jax.devices() if devices is None else list(devices)
    number = len(all_of)
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise SettingError(f"`{name}` {size} is out of range: it is at least 1, or -1.")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise SettingError(f"`{rest[0]}` and `{rest[1]}` are both -1: only one can be the rest.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        if number % known:
            _refuse_rest({k: s for k, s in sizes.items() if s > 1}, rest[0], number)
        sizes[rest[0]] = number // known
    count = math.prod(sizes.values())
    if count > number:
        raise SettingError(f"A mesh of {count} devices needs more than the {number} here.")
    shape = tuple(sizes[name] for name in _PLACES)
    types = (AxisType.Auto,) * len(_PLACES)
    if count == number:  # JAX knows which devices are neighbours
        return jax.make_mesh(shape, _PLACES, axis_types=types, devices=all_of)
    return Mesh(np.array(all_of[:count]).reshape(shape), _PLACES, axis_types=types)


def _refuse_rest(sizes: Mapping[str, int], rest: str, devices: int) -> None:
    """**Raises:** `SettingError` that names the first axis that does not divide the devices."""
    left = devices
    for name, size in sizes.items():
        if left % size:
            wanted = named(divisors(left))
            raise SettingError(
                f"`{name}` {size} does not divide {left} devices, so that `{rest}` -1 has no "
                f"size: use {wanted}."
            )
        left //= size


def parse_mesh(text: str, auto: Callable[[], Mesh] | None = None) -> Mesh:
    """Makes the mesh that a text such as `"data=4,fsdp=2"` or `"data=-1,tensor=2"` asks for.

    **Arguments:**

    - `auto`: chooses the mesh for the text `"auto"`.

    **Raises:** `SettingError`.
    """
    if text.strip() == "auto":
        if auto is None:
            raise SettingError(
                "`mesh` auto cannot be chosen here: give sizes, as in data=4,fsdp=2."
            )
        return auto()
    pairs = [re.fullmatch(r"(\w+)=([1-9]\d{0,5}|-1)", part.strip()) for part in text.split(",")]
    sizes = {pair[1]: int(pair[2]) for pair in pairs if pair is not None}
    if len(sizes) < len(pairs) or not sizes.keys() <= set(AXES):
        raise SettingError(
            f"`mesh` {text} is not understood: write the sizes of some of {', '.join(AXES)}, "
            "as in data=4,fsdp=2, and -1 for the devices that remain."
        )
    try:
        return make_mesh(**sizes, devices=None)
    except SettingError as error:
        raise SettingError(f"`mesh` {text}: {str(error).replace('`', '')}") from None


def divisors(number: int, most: int | None = None) -> list[int]:
    """Lists the numbers up to `most` that divide `number`."""
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def named(sizes: Sequence[int]) -> str:
    """Writes sizes as in `1, 2 or 4`."""
    *first, last = map(str, sizes)
    return f"{', '.join(first)} or {last}" if first else last


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Makes a mesh the current one of what is traced; `None` changes nothing."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh that what is traced now may split over: that of `on_mesh`, or of
    `jax.set_mesh`. There is none within a `shard_map`, where each device has its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Auto not in mesh.axis_types else mesh


def ways(*names: str) -> int:
    """Returns over how many devices the current mesh splits these of its axes together."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in names)


def constrain(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """Splits an activation over the current mesh, and is `x` without one.

    **Arguments:**

    - `axes`: the logical axis of each axis of `x`; `None` is whole on each device, and so is an
        axis that its mesh axis does not divide. Axes that `jax.vmap` adds follow its
        `spmd_axis_name`.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = _spec(x.shape, axes, mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def _spec(shape: Sequence[int], axes: Axes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    spec = []
    for size, logical in zip(shape, axes, strict=True):
        axis = None if logical is None else MESH_AXES[logical]
        divides = axis in mesh.shape and size % mesh.shape[axis] == 0
        spec.append(axis if divides else None)
    return PartitionSpec(*spec)


def join_streams(
    first: Shaped[Array, "a *rest"], second: Shaped[Array, "b *rest"]
) -> Shaped[Array, "a+b *rest"]:
    """Concatenates two streams of tokens so that each device keeps its own.

    Over `n` devices the order is that of the devices: the first n-th of each stream, then the
    second n-th of each. On one device this is plain concatenation. `split_streams` undoes it.
    """
    n = _shares(first.shape[0], second.shape[0])
    part = lambda x: x.reshape(n, -1, *x.shape[1:])
    joined = jnp.concatenate([part(first), part(second)], axis=1)
    return joined.reshape(-1, *first.shape[1:])


def split_streams(
    x: Shaped[Array, "both *rest"], length: int
) -> tuple[Shaped[Array, "a *rest"], Shaped[Array, "b *rest"]]:
    """Splits what `join_streams` joined; `length` is that of the first stream."""
    n = _shares(length, x.shape[0] - length)
    first, second = jnp.split(x.reshape(n, -1, *x.shape[1:]), [length // n], axis=1)
    return first.reshape(-1, *x.shape[1:]), second.reshape(-1, *x.shape[1:])


def _shares(*lengths: int) -> int:
    n = ways("context")
    return n if all(length % n == 0 for length in lengths) else 1


def logical_axes(path: str, ndim: int, rules: Sequence[Rule]) -> Axes:
    """The logical axes of a parameter, left-filled with `"layers"` for stacked leading axes.

    Vectors need no rule; a leaf of two or more dimensions matches exactly one.

    **Raises:** `LookupError` where no rule or several match, or one names too many axes.
    """
    matches = [axes for pattern, axes in rules if re.fullmatch(pattern, path)]
    if not matches and ndim < 2:
        return (None,) * ndim
    if len(matches) != 1:
        raise LookupError(f"{path} matches {len(matches)} sharding rules, not one.")
    if len(matches[0]) > ndim:
        raise LookupError(f"{path} has {ndim} axes and its sharding rule {len(matches[0])}.")
    return ("layers",) * (ndim - len(matches[0])) + matches[0]


def parameter_sharding(
    path: str, shape: tuple[int, ...], rules: Sequence[Rule], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """The sharding of one parameter. An axis that its mesh axis does not divide stays whole."""
    return NamedSharding(mesh, _spec(shape, logical_axes(path, len(shape), rules), mesh))


def check_weights(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
    mesh: Mesh | AbstractMesh,
) -> None:
    """Checks that each axis of the mesh that splits weights splits some of a network.

    **Raises:** `SettingError` that names the axis and the sizes that would.
    """
    for axis in ("fsdp", "tensor"):
        size = mesh.shape[axis]
        splits = list(_sizes(shapes, rules, axis))
        if size > 1 and not any(number % size == 0 for number in splits):
            would = [n for n in range(1, mesh.size + 1) if any(s % n == 0 for s in splits)]
            raise SettingError(
                f"`mesh`: {axis}={size} divides no weight of {name}: use {named(would)}."
            )


def _sizes(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule], axis: str
) -> Iterable[int]:
    for path, shape in shapes.items():
        for size, logical in zip(shape, logical_axes(path, len(shape), rules), strict=True):
            if logical is not None and MESH_AXES[logical] == axis:
                yield size


def check_batch(mesh: Mesh | None, batch_size: int) -> None:
    """**Raises:** `SettingError` where the mesh cannot split a batch of so many pictures."""
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % ways:
        near = named([n for n in (batch_size // ways * ways, (batch_size // ways + 1) * ways) if n])
        raise SettingError(
            f"`batch_size` {batch_size} is not a multiple of {ways}, over which the mesh splits "
            f"it (data and fsdp): use {near}."
        )


def check_picture(mesh: Mesh | AbstractMesh | None, rows: int, roles: Sequence[str]) -> None:
    """Checks that the axes `context` and `cfg` of a mesh split a picture.

    **Arguments:**

    - `rows`: the height of the latent.
    - `roles`: the conditions that guidance calls the network for.

    **Raises:** `SettingError` that names the axis and the sizes that would.
    """
    for axis, count, what in (
        ("context", rows, f"the {rows} rows of the latent"),
        ("cfg", len(roles), f"the {len(roles)} conditions of the guidance ({', '.join(roles)})"),
    ):
        if mesh is not None and count % mesh.shape[axis]:
            sizes = named(divisors(count, mesh.size))
            raise SettingError(
                f"`mesh`: {axis}={mesh.shape[axis]} does not divide {what}: use {sizes}."
            )


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Splits the leading axis of every leaf over the batch axes of the mesh."""
    if mesh is None:
        return batch
    return reshard(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
