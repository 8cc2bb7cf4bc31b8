"""How published files name the tensors: a folder for each component, or one file with all."""

from collections.abc import Mapping
from importlib import resources

from eqxdiff.checkpoint import Form, Shape, TableFile
from eqxdiff.models import Lookalikes, LoraBase, LoraNames, PublishedFiles


TABLES = resources.files("sketch") / "weights_map"

SCRIBE = (Form(TABLES / "scribe.toml", ("letters.weight",)),)
PAINTER = (
    Form(TABLES / "painter.toml", ("boldness_embedder.linear_1.weight",)),
    Form(TABLES / "painter_single.toml", ("bold_in.weight",)),
)
PRESS = (Form(TABLES / "press.toml", ("press_in.weight",)),)

SMALL = Lookalikes(
    "Sketch small",
    ("sketch-small",),
    {
        "scribe": (SCRIBE[0].table, "text"),
        "painter": (PAINTER[1].table, "paint"),
        "press": (PRESS[0].table, "autoencoder"),
    },
)


def recognise(kind: TableFile, shapes: Mapping[str, Shape]) -> Lookalikes | None:
    """Returns the sort of a painter: there is one."""
    return SMALL if kind == PAINTER[0].table else None


FILES = PublishedFiles((SMALL,), recognise)

LORA = LoraNames(
    prefixes={"scribe": ("lora_scribe_",), "painter": ("lora_painter_",)},
    bases=(LoraBase("Sketch", r"lora_painter_(blocks|layers)_\d+_", 32),),
)
