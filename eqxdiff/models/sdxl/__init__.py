"""Stable Diffusion XL, SDXL-Lightning and SDXL-Turbo."""
