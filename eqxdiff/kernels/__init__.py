"""Kernels: each has one typed interface, a reference in XLA, and a file for each backend."""

from .attention import attention as attention
