"""Kernels: each has one typed interface, a reference in XLA, and a file for each backend."""

from ._choice import (
    Attention as Attention,
    AttentionChoice as AttentionChoice,
    Blocks as Blocks,
    attending as attending,
    attention_for as attention_for,
    choose_attention as choose_attention,
)
from .attention import attention as attention
