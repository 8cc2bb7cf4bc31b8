"""Array types shared by every module: jaxtyping aliases and nothing else."""

from jaxtyping import Array, Float, Int, Key


PRNGKey = Key[Array, ""]
"""A typed key, as made by `jax.random.key`."""

Scalar = Float[Array, ""]
"""One floating point number."""

Tokens = Int[Array, " tokens"]
"""Token ids of one prompt."""

Image = Float[Array, "height width channels"]
"""One image or latent, channels last."""
