"""What one picture is asked to be."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image as PILImage

from .._errors import PromptError, SettingError
from ..models import Control, check_range
from ..pictures import Pictured, to_unit
from ..sampling import Interval, Schedule
from .texts import Encoded


@dataclasses.dataclass(frozen=True, eq=False)
class ControlImage:
    """A picture of what to draw where, for one ControlNet.

    **Fields:**

    - `image`: of the size of the picture to be made.
    - `scale`: how much it counts; 0 is off.
    - `start`, `end`: it acts on the steps that lie between these parts of all steps, from 0 to 1.
    - `guess`: whether it acts on the prompt's condition alone and the less the finer the layer, for
        pictures without a prompt.
    """

    image: Pictured
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def resolve(self, settings: Any, schedule: Schedule) -> Control:
        """Returns the arrays that a ControlNet takes. **Raises:** `SettingError`."""
        pixels = to_unit(self.image, name="controls")
        wanted = settings.height, settings.width, 3
        if pixels.shape != wanted:
            size = "x".join(map(str, pixels.shape[1::-1]))
            raise SettingError(
                f"A control image is {size} and the picture {settings.width}x{settings.height}: "
                "resize it, or give its size as `width` and `height`."
            )
        check_range("control_scale", self.scale, 0)
        interval = Interval.over(schedule, self.start, self.end, name="A control image")
        scale = jnp.asarray(self.scale, jnp.float32)
        return Control(jnp.asarray(pixels), scale, interval, self.guess)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One picture: its prompt, its noise, its input pictures and its settings.

    Requests of one batch may differ in all of these. `Request.make` takes the settings as keyword
    arguments.

    **Fields:**

    - `prompt`: a text, or a row of what `Pipeline.encode` returned.
    - `seed`: the noise is that of `jax.random.key(seed)`.
    - `settings`: by name; the model's defaults hold for the others.
    - `image`: the picture to begin with; for models that edit, their reference pictures.
    - `mask`: where it is made anew: white, and black where it is kept.
    - `mask_blur`: the radius of the blur of the mask's edge, in pixels of the mask.
    - `mask_crop`: work on the masked part and so many pixels around it at full resolution, and
        paste the result into the picture; `None` works on the whole picture.
    - `controls`: an image for each ControlNet of the pipeline, or none.
    - `noise`: unit noise in place of the seed's, `(channels, height / 8, width / 8)`.
    - `encode_noise`: the noise that the autoencoder samples the input picture's latent with,
        likewise.
    """

    prompt: str | Encoded
    seed: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image: Pictured | Sequence[Pictured] | None = None
    mask: Pictured | None = None
    mask_blur: float = 0.0
    mask_crop: int | None = None
    controls: Sequence[ControlImage] = ()
    noise: Float[Array | np.ndarray, "c h w"] | None = None
    encode_noise: Float[Array | np.ndarray, "c h w"] | None = None

    @classmethod
    def make(cls, prompt: str | Encoded, **given: Any) -> "Request":
        """Makes a request of a prompt and of settings and fields by name."""
        own = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in given.items() if name in own}
        return cls(prompt, settings={n: v for n, v in given.items() if n not in own}, **fields)

    @property
    def images(self) -> tuple[Pictured, ...]:
        """The pictures in `image`."""
        match self.image:
            case None:
                return ()
            case PILImage.Image() | np.ndarray():
                return (self.image,)
        return tuple(self.image)

    @property
    def text(self) -> str:
        """The prompt's text."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt.prompts[0]


Prompts = str | Request | Encoded | Sequence[str | Request]


def expand(
    prompts: Prompts, *, seed: int, num_images: int, given: Mapping[str, Any], **fields: Any
) -> list[Request]:
    """Lists the requests of `num_images` pictures of each prompt, with seeds that count up.

    **Arguments:**

    - `given`: settings, which those of a request in `prompts` override.
    - `fields`: further fields of the requests that are made of texts.

    **Raises:** `PromptError` where there are no prompts, `SettingError` for a seed out of range.
    """
    check_range("num_images", num_images, 1)
    check_range("seed", seed, 0, 2**32 - num_images)
    requests = []
    for prompt in _each(prompts):
        if isinstance(prompt, Request):
            check_range("seed", prompt.seed, 0, 2**32 - num_images)
            prompt = dataclasses.replace(prompt, settings={**given, **prompt.settings})
        else:
            prompt = Request(prompt, seed, given, **fields)
        requests += [dataclasses.replace(prompt, seed=prompt.seed + k) for k in range(num_images)]
    if not requests:
        raise PromptError("There is no prompt: give at least one.")
    return requests


def _each(prompts: Prompts) -> Iterator[str | Request | Encoded]:
    if isinstance(prompts, str | Request):
        yield prompts
    elif isinstance(prompts, Encoded):
        yield from (prompts[i] for i in range(len(prompts.prompts)))
    else:
        for prompt in prompts:
            if not isinstance(prompt, str | Request):
                raise PromptError(f"A prompt is a text, not {prompt!r:.60}.")
            yield prompt


def share(
    requests: Sequence[Request], name: str, array: Any, shape: tuple[int, ...]
) -> list[Request]:
    """Gives each request its row of an array of all pictures.

    **Raises:** `SettingError` where it is misshapen or not finite.
    """
    if array is None:
        return list(requests)
    check_noise(name, array, (len(requests), *shape))
    rows = zip(requests, np.asarray(array), strict=True)
    return [dataclasses.replace(request, **{name: row}) for request, row in rows]


def check_noise(name: str, noise: Any, shape: tuple[int, ...]) -> None:
    """**Raises:** `SettingError` where injected noise is misshapen or not finite."""
    noise = np.asarray(noise)
    if noise.shape != shape:
        raise SettingError(f"`{name}` has the shape {noise.shape}; these images need {shape}.")
    if not np.issubdtype(noise.dtype, np.floating) or not np.isfinite(noise).all():
        raise SettingError(f"`{name}` is not made of finite floating point numbers.")
