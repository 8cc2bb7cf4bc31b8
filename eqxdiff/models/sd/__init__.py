"""Stable Diffusion 1.5, 2, 2.1 and Turbo."""
