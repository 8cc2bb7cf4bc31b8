"""The loop over the steps: an iterator, and the same step scanned."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from ..models import Modules
from ..sampling import AbstractNetwork, Hook, Row, State, begin, sample, step
from ..sampling.sample import Remat, finish, on_rows
from ..sharding import BATCH_AXES, shard_batch
from .batch import Example
from .blueprint import Blueprint
from .pipeline import Pipeline


class Step(NamedTuple):
    """One step of a batch, as `steps` yields it.

    `x` is given away to the next step: who wants to keep it copies it before.
    """

    number: int
    """How many steps came before."""

    row: Row
    """The noise level that the step began at, for each picture."""

    x: Float[Array, "n h w c"]
    """The latents after the step."""

    x0: Float[Array, "n h w c"]
    """The denoised latents that the step began with: what to show meanwhile."""

    attention: Mapping[str, str]
    """The backend of each shape of attention, such as `{"4608x24x128": "cudnn"}`."""


def steps(
    blueprint: Blueprint,
    modules: Modules,
    batch: Example,
    hooks: Sequence[Hook] = (),
    *,
    begin: Callable[..., Any] | None = None,
    advance: Callable[..., Any] | None = None,
) -> Iterator[Step]:
    """Yields the steps of a batch: progress, previews and cancelling are the caller's `for`.

    Each step is one call of one compiled program with a traced index.

    **Arguments:**

    - `modules`: those of the denoiser's stage.
    - `batch`: from `stack_examples`.
    - `hooks`: shared by all pictures.
    - `begin`, `advance`: programs in place of `begin_batch` and `step_batch`.
    """
    yield from start_loop(blueprint, modules, batch, hooks, begin=begin, advance=advance).steps()


class Started(NamedTuple):
    """A loop before its first step.

    `x` and `state` are given away: call one of the methods, once.
    """

    loop: "Loop"
    """Its `modules` are those that the steps need: no others have to stay on the device."""

    x: Float[Array, "n h w c"]
    state: State
    advance: Callable[..., Any]
    """Makes a step: `step_batch`, or a program in its place."""

    def steps(self) -> Iterator[Step]:
        """Yields the steps, as `steps` does."""
        loop, x, state, advance = self
        for index in range(loop.batch.recipe.schedule.alpha.shape[-1] - 1):
            x, x0, row, state, used = advance((loop, jnp.asarray(index)), x, state)
            yield Step(index, row, x, x0, used)

    def finish(self) -> tuple[Float[Array, "n h w c"], Mapping[str, str]]:
        """Takes all steps in one program. Returns the last latents, and `Step.attention`."""
        if self.advance is step_batch:
            return _finish(self.loop, self.x, self.state)
        *_, last = self.steps()
        return last.x, last.attention


def start_loop(
    blueprint: Blueprint,
    modules: Modules,
    batch: Example,
    hooks: Sequence[Hook] = (),
    *,
    begin: Callable[..., Any] | None = None,
    advance: Callable[..., Any] | None = None,
) -> Started:
    """Computes all that no step changes. **Arguments:** as of `steps`."""
    loop = Loop(modules, shard_batch(batch, blueprint.mesh), tuple(hooks), blueprint)
    x, state, conditions = (begin or begin_batch)(loop)
    return Started(loop.after(conditions), x, state, advance or step_batch)


class Loop(eqx.Module):
    """What stays the same from step to step."""

    modules: Modules
    batch: Example
    hooks: tuple[Hook, ...]
    blueprint: Blueprint = eqx.field(static=True)
    ahead: bool = eqx.field(static=True, default=False)
    """Whether the conditions of the batch are those that the network computed ahead."""

    def after(self, conditions: PyTree) -> "Loop":
        """Returns the loop of the steps, after `begin_batch` has computed the conditions ahead.

        It has the modules that the steps still need, where the network can say which.
        """
        model, dtype = self.blueprint.model, self.blueprint.compute_dtype
        network = model.network(self.modules, self.batch.shared, dtype)
        if not isinstance(network, AbstractNetwork) or not on_rows(self.hooks):
            return self
        batch = eqx.tree_at(lambda batch: batch.conditions, self.batch, conditions)
        used = set(map(id, jax.tree.leaves(network.rest())))
        needed = jax.tree.map(lambda leaf: id(leaf) in used, self.modules)
        modules = eqx.filter(self.modules, needed)
        return Loop(modules, batch, self.hooks, self.blueprint, ahead=True)

    def map(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Maps a function of a denoiser, an example and more over the batch."""
        blueprint = self.blueprint

        def one(example: Example, *more: Any) -> PyTree:
            model, dtype = blueprint.model, blueprint.compute_dtype
            denoiser = example.denoiser(model, self.modules, dtype, ahead=self.ahead)
            return function(denoiser, example, *more)

        return over_batch(one, blueprint.mesh)


@eqx.filter_jit
def begin_batch(loop: Loop) -> tuple[Array, State, PyTree]:
    """Returns the latents of a batch before the first step, the solver's state, and the conditions
    with all that no step changes computed ahead."""

    def one(denoiser, example):
        x, recipe = example.start(), example.recipe
        state = begin(denoiser, x, recipe.schedule, recipe.solver)
        if on_rows(loop.hooks):
            denoiser = denoiser.ahead(x, recipe.schedule)
        return x, state, denoiser.conditions

    with loop.blueprint.computing():
        return loop.map(one)(loop.batch)


@eqx.filter_jit(donate="all-except-first")
def step_batch(
    fixed: tuple[Loop, Array], x: Float[Array, "n h w c"], state: State
) -> tuple[Array, Array, Row, State, dict[str, str]]:
    """Makes one step of a batch: returns `x`, `x0`, the row that it began at, the solver's state
    and the backend of each attention.

    It gives the buffers of `x` and `state` away.
    """
    loop, index = fixed

    def one(denoiser, example, x, state):
        schedule, solver = example.recipe.schedule, example.recipe.solver
        hooks = example.hooks(loop.hooks)
        x, x0, state = step(denoiser, x, state, schedule, index, solver, example.key, hooks)
        return x, x0, schedule[index], state

    with loop.blueprint.computing() as used:
        made = loop.map(one)(loop.batch, x, state)
    return *made, used


@eqx.filter_jit(donate="all-except-first")
def _finish(
    loop: Loop, x: Float[Array, "n h w c"], state: State
) -> tuple[Array, Mapping[str, str]]:
    def one(denoiser, example, x, state):
        schedule, solver = example.recipe.schedule, example.recipe.solver
        hooks = example.hooks(loop.hooks)
        return finish(denoiser, x, state, schedule, solver, example.key, hooks)

    with loop.blueprint.computing() as used:
        x = loop.map(one)(loop.batch, x, state)
    return x, used


def sample_latent(
    pipe: Pipeline, example: Example, *, hooks: Sequence[Hook] = (), remat: Remat = "none"
) -> Float[Array, "h w c"]:
    """Samples the latent of one picture: pure, differentiable, all steps in one program.

    Batches and sweeps come by `jax.vmap` over anything in the example.

    **Arguments:**

    - `pipe`: with the denoiser's stage.
    - `example`: from `prepare`.
    - `hooks`, `remat`: as of `eqxdiff.sample`.
    """
    blueprint, recipe = pipe.blueprint, example.recipe
    dtype = blueprint.compute_dtype
    with blueprint.computing():
        denoiser = example.denoiser(blueprint.model, pipe.stage("denoiser"), dtype)
        return sample(
            denoiser,
            example.start(),
            recipe.schedule,
            recipe.solver,
            key=example.key,
            hooks=example.hooks(hooks),
            remat=remat,
        )


def decode(
    pipe: Pipeline, latent: Float[Array, "h w c"], *, tiled: bool = False
) -> Float[Array, "H W 3"]:
    """Decodes one latent to a picture from 0 to 1: pure and differentiable.

    **Arguments:**

    - `pipe`: with the autoencoder's stage.
    """
    blueprint = pipe.blueprint
    with blueprint.computing():
        return blueprint.model.to_image(
            pipe.stage("vae"), latent, blueprint.compute_dtype, tiled=tiled
        )


@eqx.filter_jit
def decode_batch(
    blueprint: Blueprint, modules: Modules, latents: Float[Array, "n h w c"], tiled: bool
) -> tuple[Float[Array, "n H W 3"], dict[str, str]]:
    """Decodes a batch of latents. Returns the pictures and the backend of each attention."""
    model, dtype = blueprint.model, blueprint.compute_dtype
    one = lambda latent: model.to_image(modules, latent, dtype, tiled=tiled)
    with blueprint.computing() as used:
        images = over_batch(one, blueprint.mesh)(latents)
    return images, used


def over_batch(function: Callable[..., PyTree], mesh: Mesh | None) -> Callable[..., PyTree]:
    """Maps over a batch that is split over the mesh; without the names XLA would gather it."""
    return jax.vmap(function, spmd_axis_name=None if mesh is None else BATCH_AXES)
