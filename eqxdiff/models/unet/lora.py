"""How published LoRAs name the layers of the families around a text-conditional UNet."""

from .._lora import LoraBase


CROSS_ATTENTION = r"attn2[._](processor[._])?to_[kv]$"
"""The layers whose inputs are the hidden states of the prompt."""


def cross_attention_base(name: str, context_dim: int) -> LoraBase:
    """Returns the base whose prompts have hidden states of `context_dim` numbers."""
    return LoraBase(name, CROSS_ATTENTION, context_dim)
