"""Stable Diffusion XL, SDXL-Lightning and SDXL-Turbo."""

from .family import STABLE_DIFFUSION_XL as STABLE_DIFFUSION_XL
