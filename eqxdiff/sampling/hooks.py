"""Hooks: functions of the user's own that change x0 or x between steps."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .denoiser import Denoise
from .schedule import Row, X, add_noise


class Moment(eqx.Module):
    """Where in sampling a step has ended.

    **Fields:**

    - `index`: the step.
    - `row`: the noise level that the step started from.
    - `to`: the noise level that x is at now.
    - `last`: whether it was the last step.
    """

    index: Int[Array, ""]
    row: Row
    to: Row
    last: Bool[Array, ""]


class Hook(eqx.Module):
    """Functions that are compiled into every step.

    Each is a plain function, an `eqx.Partial`, or a module; the arrays of the latter two are
    arguments of the compiled step, so that others of the same shape do not compile again.

    **Arguments:**

    - `on_x0`: `(x0, x, row, denoise) -> x0`, called after every evaluation of the denoiser.
        `denoise` is the denoiser `(x, row) -> x0` without hooks, to take a gradient through.
    - `on_x`: `(x, x0, moment) -> x`, called after the solver's step, with the x0 that it used.
    """

    on_x0: Callable[[X, X, Row, Denoise], X] | None = None
    on_x: Callable[[X, X, Moment], X] | None = None


class Blend(eqx.Module):
    """An `on_x` that repaints a part of a picture and keeps the rest (latent blending).

    After each step, the part to keep is put back with the noise that belongs to the step's end;
    after the last step, without noise.

    **Arguments:**

    - `mask`: 1 is repainted and 0 is kept; values between are mixed. It broadcasts over channels.
    - `clean`: the data of the picture.
    - `noise`: unit noise, for all steps the same.

    Source: https://arxiv.org/abs/2206.02779; the inpainting pipelines of diffusers.
    """

    mask: Float[Array, "*mask"]
    clean: X
    noise: X

    def __call__(self, x: X, x0: X, moment: Moment) -> X:
        mask, clean, noise = (v.astype(x.dtype) for v in (self.mask, self.clean, self.noise))
        kept = jnp.where(moment.last, clean, add_noise(clean, noise, moment.to))
        return mask * x + (1 - mask) * kept


def hooked(hooks: Sequence[Hook], denoise: Denoise, x0: X, x: X, row: Row) -> X:
    """Returns x0 after the `on_x0` of all hooks in turn."""
    for hook in hooks:
        if hook.on_x0 is not None:
            x0 = hook.on_x0(x0, x, row, denoise)
    return x0
