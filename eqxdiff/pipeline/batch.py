"""Pictures as arrays: what one is made of, and several in one batch."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PyTree

from .._errors import SettingError
from .._types import PRNGKey
from ..models import PROMPT, AbstractModel, Inputs, Modules, Recipe, Text, tiles
from ..sampling import (
    AbstractNetwork,
    Blend,
    GuidedDenoiser,
    Hook,
    add_noise,
    stack_conditions,
    start,
)
from .blueprint import Blueprint
from .inputs import STRENGTH, Pixels, one_image, read_pixels, read_references
from .request import Request, check_noise
from .texts import Cut, Encoded, tokenize


class Example(eqx.Module):
    """All that belongs to one picture, as arrays. In a batch each has a leading axis.

    **Fields:**

    - `key`: of the noise that stochastic solvers add.
    - `noise`: the unit noise that sampling starts from.
    - `conditions`: with a leading axis of the guider's roles.
    - `shared`: what the network is told besides.
    - `recipe`: schedule, solver, parameterization and guider.
    - `clean`: the latent that the noise is added to; `None` starts from noise alone.
    - `blend`: keeps a part of the input picture.
    """

    key: PRNGKey
    noise: Float[Array, "h w c"]
    conditions: PyTree
    shared: PyTree
    recipe: Recipe
    clean: Float[Array, "h w c"] | None
    blend: Blend | None

    def start(self) -> Float[Array, "h w c"]:
        """Returns the noisy latent that sampling starts from."""
        if self.clean is None:
            return start(self.noise, self.recipe.schedule)
        return add_noise(self.clean, self.noise, self.recipe.schedule[0])

    def denoiser(
        self, model: AbstractModel, modules: Modules, dtype: DTypeLike, *, ahead: bool = False
    ) -> GuidedDenoiser:
        """Returns the denoiser of this picture.

        **Arguments:**

        - `modules`: those of the denoiser's stage.
        - `ahead`: whether the conditions are those that the network computed ahead.
        """
        network, recipe = model.network(modules, self.shared, dtype), self.recipe
        if ahead and isinstance(network, AbstractNetwork):
            network = network.rest()
        return GuidedDenoiser(network, self.conditions, recipe.guider, recipe.parameterization)

    def hooks(self, others: Sequence[Hook]) -> tuple[Hook, ...]:
        """Returns the user's hooks and then the blend of the input picture."""
        return (*others, *(() if self.blend is None else (Hook(on_x=self.blend),)))


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A request with all that can be known of it before anything is computed.

    **Fields:**

    - `index`: its place among all requests.
    - `texts`: the tokens of each role; of an encoded prompt, none.
    - `references`: the pictures that an editing model looks at, from -1 to 1, in its sizes.
    - `form`: jobs of equal forms are run by one program, in one batch.
    """

    index: int
    request: Request
    settings: Any
    recipe: Recipe
    texts: Mapping[str, Text]
    pixels: Pixels | None
    references: tuple[np.ndarray, ...]
    form: Any

    @classmethod
    def make(cls, blueprint: Blueprint, index: int, request: Request) -> "Job":
        """Resolves the settings, tokenizes the prompt and reads the input pictures.

        **Raises:** `SettingError`, `PromptError`.
        """
        given = dict(request.settings)
        references = read_references(blueprint, request)
        if references:  # by default the new picture has the size of the first
            sides = dict(zip(("height", "width"), references[0].shape[:2], strict=True))
            given |= {name: side for name, side in sides.items() if given.get(name) is None}
        image = one_image(blueprint, request)
        request = dataclasses.replace(request, image=image)
        if request.image is None and given.get("strength") is not None:
            raise SettingError("`strength` would be ignored without `image`.")
        if request.image is not None and given.get("strength") is None:
            given["strength"] = STRENGTH if request.mask is None else 1.0
        settings = blueprint.resolve(given)
        if blueprint.model.inpaints and request.mask is None:
            raise SettingError(f"{blueprint.name} is made for inpainting: give `image` and `mask`.")
        recipe = blueprint.model.recipe(settings)
        if request.noise is not None:
            h, w, c = recipe.shape
            check_noise("noise", request.noise, (c, h, w))
        if len(request.controls) not in (0, blueprint.controlnets):
            raise SettingError(
                f"The model is loaded with {blueprint.controlnets} ControlNets, and there are "
                f"{len(request.controls)} control images."
            )
        for control in request.controls:
            control.resolve(settings, recipe.schedule)
        texts, said = {}, request.prompt
        if isinstance(said, Encoded):
            if set(said.roles) != set(recipe.guider.roles):
                raise SettingError(
                    "Encode the prompts with the guidance settings that they are used with."
                )
            tokens: Any = said.roles
        else:
            texts = tokenize(blueprint, said, settings, recipe.guider.roles)
            tokens = {role: text.tokens for role, text in texts.items()}
        pixels = read_pixels(request, settings)
        leaves, structure = jax.tree.flatten((recipe, tokens))
        form = (
            structure,
            tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves),
            pixels is not None and (settings.strength < 1, pixels.mask is not None),
            tuple(picture.shape for picture in references),
            tuple(control.guess for control in request.controls),
            tiles(settings),
        )
        return cls(index, request, settings, recipe, texts, pixels, references, form)

    @property
    def encodes(self) -> bool:
        """Whether it needs the autoencoder before it is sampled."""
        return self.pixels is not None or bool(self.references)

    def example(
        self, blueprint: Blueprint, encoded: Mapping[str, PyTree], inputs: Inputs
    ) -> Example:
        """Returns the arrays of the picture.

        **Arguments:**

        - `encoded`: what the text encoders say, by role.
        """
        model, key = blueprint.model, seed_key(self.request.seed)
        conditions = [
            model.condition(encoded[role], self.settings, role) for role in self.recipe.guider.roles
        ]
        h, w, c = self.recipe.shape
        if self.request.noise is None:
            noise = initial_noise([self.request.seed], (c, h, w))[0]
        else:
            noise = jnp.asarray(self.request.noise, jnp.float32)
        noise = noise.transpose(1, 2, 0)
        blend = None
        if inputs.image is not None and inputs.mask is not None and not model.inpaints:
            blend = Blend(inputs.mask, inputs.image, noise)
        starts = inputs.image is not None and self.settings.strength < 1
        return Example(
            key,
            noise,
            stack_conditions(*conditions),
            model.shared(inputs, self.settings),
            self.recipe,
            inputs.image if starts else None,
            blend,
        )


def make_jobs(blueprint: Blueprint, requests: Iterable[Request | Job]) -> list[Job]:
    """Makes the jobs of requests. **Raises:** `SettingError`, `PromptError`."""
    return [
        request if isinstance(request, Job) else Job.make(blueprint, index, request)
        for index, request in enumerate(requests)
    ]


def cuts(jobs: Iterable[Job]) -> list[Cut]:
    """Lists what text encoders do not see of the prompts, each once."""
    numbers: dict[str, int] = {}
    found: dict[Any, Cut] = {}
    for job in jobs:
        number = numbers.setdefault(job.request.text, len(numbers) + 1)
        for role, text in job.texts.items():
            what = f"prompt {number}" if role == PROMPT else f"{role} prompt"
            for encoder, part in text.parts.items():
                if part.dropped:
                    cut = Cut(what, encoder, len(part.ids), part.dropped)
                    found.setdefault((what, encoder, part.dropped), cut)
    return list(found.values())


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Float[Array, "n c h w"]:
    """Draws unit noise in float32: that of a seed depends on no other seed and on no device."""
    return jnp.stack([jax.random.normal(seed_key(seed), shape, jnp.float32) for seed in seeds])


def seed_key(seed: int) -> PRNGKey:
    """Returns the key of a seed, of the same generator however JAX is configured."""
    return jax.random.key(seed, impl="threefry2x32")


def batches(jobs: Iterable[Job], size: int) -> list[list[Job]]:
    """Groups jobs of one form, in the order in which the forms appear."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.form, []).append(job)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def stack_examples(examples: Sequence[Example], size: int) -> Example:
    """Stacks examples of one form to a batch, which the last one fills up."""
    padded = [*examples, *[examples[-1]] * (size - len(examples))]
    return _stack(tuple(padded))


@eqx.filter_jit
def _stack(examples: tuple[Example, ...]) -> Example:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *examples)


def to_bytes(array: Float[np.ndarray, "*shape"]) -> np.ndarray:
    """Rounds values in [0, 1] to 8 bits."""
    return np.round(array * 255).astype(np.uint8)
