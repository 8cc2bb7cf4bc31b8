"""Exact changes of a loaded model for speed: weights in another order, the same results.

A pass knows layers and no family. `fast` applies all passes and `published` takes them back, so
that what reads or writes weights by the checkpoint's names sees the checkpoint's order.
"""

from .bound import bound_scores as bound_scores
from .conv import lay_convolutions as lay_convolutions
from .fast import fast as fast, is_fast as is_fast, published as published
from .rope import reorder_rope as reorder_rope
