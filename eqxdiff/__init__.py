"""Text-to-image diffusion models in JAX and Equinox."""

import importlib.metadata


__version__ = importlib.metadata.version("eqxdiff")
