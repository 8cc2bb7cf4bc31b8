"""The nearest way to make a picture that fits, and the mesh for `--mesh auto`."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from .._errors import SettingError
from ..models import GuidedSettings, TiledSettings, declarations
from .estimate import Choice, Forecast, make_plan, spell_mesh
from .shapes import Skeletons
from .targets import Target, enlarged


Narrowed = Callable[[str], Skeletons]
"""Returns the skeletons of a model whose weights are kept in a dtype."""


class Change(NamedTuple):
    """One change of a choice: its words, and its dtype where the change is one."""

    words: str
    choice: Choice
    dtype: str | None = None


def advise(plan: Forecast, skeletons: Skeletons, narrowed: Narrowed | None = None) -> str | None:
    """Returns in words the nearest change that fits; `None` where none of those known does.

    It tries, one at a time and then several together: dropping the text encoders, decoding tile by
    tile, weights in bfloat16, guidance by two calls; then meshes of the target; then more such
    devices; then fewer and smaller pictures.
    """
    target, choice = plan.target, plan.choice
    toggles = list(_toggles(plan, narrowed))
    meshes: list[Mapping[str, int]] = [choice.mesh]
    meshes += [mesh for mesh in _meshes(target.devices) if mesh != choice.mesh]
    for count in range(1, len(toggles) + 1):
        for chosen in itertools.combinations(toggles, count):
            if found := _try(skeletons, target, choice, chosen, narrowed):
                return found
    everything = tuple(toggles)
    for mesh in meshes[1:]:
        for chosen in ((), everything):
            words = f"`mesh` {spell_mesh(mesh)}"
            batch_size = None if choice.batch_size in (None, 1) else choice.batch_size
            other = dataclasses.replace(choice, mesh=mesh, batch_size=batch_size)
            if found := _try(skeletons, target, other, chosen, narrowed, words):
                return found
    for devices in (n for n in (2, 4, 8, 16) if n > target.devices and target.name != "cpu"):
        more = enlarged(target, devices)
        for mesh in _meshes(devices):
            words = f"`target` {more.name} with `mesh` {spell_mesh(mesh)}"
            other = dataclasses.replace(choice, mesh=mesh, batch_size=None)
            for chosen in ((), everything):
                if found := _try(skeletons, more, other, chosen, narrowed, words):
                    return found
    smaller = dict(choice.settings)
    for _ in range(3):
        step = 64
        height, width = (max(step, side // 2 // step * step) for side in _size(plan, smaller))
        smaller |= {"height": height, "width": width}
        other = dataclasses.replace(choice, settings=smaller, batch_size=None)
        words = f"`size` {width}x{height}"
        words += "" if choice.pictures == choice.parts else " and a smaller `batch_size`"
        if found := _try(skeletons, target, other, everything, narrowed, words):
            return found
    return None


def _size(plan: Forecast, settings: Mapping[str, Any]) -> tuple[int, int]:
    own = plan.settings
    return int(settings.get("height") or own.height), int(settings.get("width") or own.width)


def _toggles(plan: Forecast, narrowed: Narrowed | None) -> Iterator[Change]:
    choice, settings = plan.choice, plan.settings
    if choice.keep == "device" and not choice.train:
        yield Change("`release` text", dataclasses.replace(choice, keep="nowhere"))
    tiles = isinstance(settings, TiledSettings) and not settings.vae_tiling
    if (
        tiles
        and not choice.train
        and plan.program("decode").temporary > plan.program("step").temporary
    ):
        yield _set(choice, "vae_tiling")
    if narrowed is not None and any("float32" in one.dtype for one in plan.components):
        yield Change("`dtype` bfloat16", choice, "bfloat16")
    guided = isinstance(settings, GuidedSettings) and not settings.sequential_guidance
    scale = next((n for n in ("guidance", "cfg") if n in declarations(type(settings))), "")
    if (
        guided
        and not choice.train
        and (getattr(settings, "cfg", None) or getattr(settings, scale, None) or 0) > 1
    ):
        yield _set(choice, "sequential_guidance")


def _set(choice: Choice, name: str) -> Change:
    settings = {**choice.settings, name: True}
    return Change(f"`{name}`", dataclasses.replace(choice, settings=settings))


def _try(
    skeletons: Skeletons,
    target: Target,
    choice: Choice,
    changes: tuple[Change, ...],
    narrowed: Narrowed | None,
    words: str = "",
) -> str | None:
    """Returns the words of changes that fit together, and what is then needed."""
    settings, keep = dict(choice.settings), choice.keep
    for change in changes:
        settings |= {n: v for n, v in change.choice.settings.items() if n not in settings}
        keep = change.choice.keep if change.choice.keep != "device" else keep
        if change.dtype is not None and narrowed is not None:
            skeletons = narrowed(change.dtype)
    try:
        plan = make_plan(
            skeletons, target, dataclasses.replace(choice, settings=settings, keep=keep)
        )
    except SettingError:  # such as guidance by two calls of a model without guidance
        return None
    if not plan.fits:
        return None
    told = [*filter(None, [words]), *(change.words for change in changes)]
    return f"{' and '.join(told)} ({gib(plan.peak)})"


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    """Yields meshes of all devices: copies of the weights first, then shared weights."""
    if devices == 1:
        return
    yield {"data": devices}
    if devices % 2 == 0:
        yield {"cfg": 2, "data": devices // 2}
    for parts in (n for n in range(2, devices + 1) if devices % n == 0):
        rest = {"data": devices // parts} if parts < devices else {}
        yield {**rest, "fsdp": parts}
    for parts in (n for n in range(2, devices + 1) if devices % n == 0):
        rest = {"data": devices // parts} if parts < devices else {}
        yield {**rest, "tensor": parts}


def auto_mesh(
    skeletons: Skeletons, target: Target, choice: Choice, *, narrowed: Narrowed | None = None
) -> Forecast:
    """Plans with the mesh of all devices that makes pictures fastest, of those that fit.

    **Raises:** `SettingError` where none fits.
    """
    plans = []
    for mesh in _meshes(target.devices) if target.devices > 1 else [{}]:
        own = dataclasses.replace(choice, mesh=mesh)
        with contextlib.suppress(SettingError):  # the mesh does not divide these pictures
            plans.append(make_plan(skeletons, target, own))
    if not plans:
        raise SettingError(f"No mesh of {target.devices} devices divides these pictures.")
    fits = [plan for plan in plans if plan.fits]
    if not fits:
        require(min(plans, key=lambda plan: plan.peak), skeletons, narrowed)
    return min(fits, key=lambda plan: plan.seconds / plan.choice.pictures)


def require(plan: Forecast, skeletons: Skeletons, narrowed: Narrowed | None = None) -> None:
    """**Raises:** `SettingError`, with advice, where the memory is too little."""
    if plan.fits:
        return
    advice = advise(plan, skeletons, narrowed)
    name = "this machine" if plan.target.name == "cpu" else plan.target.name
    raise SettingError(
        f"{plan.model} needs {gib(plan.peak)} of memory on a device, and {name} has "
        f"{gib(plan.target.chip.memory)}. "
        + (f"This fits: {advice}." if advice else "Nothing that is known of makes it fit.")
    )


def gib(nbytes: float) -> str:
    """Spells a number of bytes."""
    return f"{nbytes / 2**30:.2f} GiB"
