"""Stable Diffusion XL, SDXL-Lightning and SDXL-Turbo."""

from .family import StableDiffusionXL as StableDiffusionXL
