"""Kernels: one typed interface each, an XLA reference, and a file for each backend."""

from .attention import attention as attention
