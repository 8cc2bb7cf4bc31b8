"""How trainers spell the names of an adapter's tensors: data, and the few lines that read it.

A name has three parts. A prefix names the component. Then comes the name of a module in some
published layout, with its dots or with underscores in their place. An ending names the tensor's
role in the adapter. Underscores are never turned back into dots by a guess: the module is searched
among the names that the model really has. The families list the prefixes and the formats that
belong to them alone; this file holds the spellings that serve every family.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from .._errors import CheckpointError
from ..models import LoraFormat
from .components import NamedFamily, every_family


GENERIC = (
    ("NAME.base_model.model.", False),
    ("base_model.model.", False),
    ("NAME.", False),
    ("", False),
    ("", True),
)
"""The prefixes that any component may have, `NAME` being its name, and whether the module's name
that follows has underscores for dots."""

_WEIGHT = r"(?:\.weight)?"
_NAMED = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # PEFT's name of the adapter
ENDINGS = tuple(
    (re.compile(pattern), slot)
    for pattern, slot in (
        (rf"\.lora_(?:down|A){_NAMED}{_WEIGHT}$", "down"),
        (rf"\.lora_(?:up|B){_NAMED}{_WEIGHT}$", "up"),
        (rf"\.lora_(?:up|B){_NAMED}\.bias$", "up_bias"),
        (rf"\.lora_mid{_WEIGHT}$", "mid"),
        (r"(?:\.|_)lora\.down\.weight$", "down"),
        (r"(?:\.|_)lora\.up\.weight$", "up"),
        (r"\.lora_linear_layer\.down\.weight$", "down"),
        (r"\.lora_linear_layer\.up\.weight$", "up"),
        (r"(?:(?:\.|_)lora|\.lora_linear_layer)?\.alpha$", "alpha"),
        (rf"\.dora_scale{_WEIGHT}$", "dora_scale"),
        (rf"\.lora_magnitude_vector{_NAMED}{_WEIGHT}$", "magnitude"),
        (rf"\.(?P<slot>hada_(?:w[12]_[ab]|t[12])){_WEIGHT}$", ""),
        (rf"\.(?P<slot>lokr_(?:w[12](?:_[ab])?|t2)){_WEIGHT}$", ""),
        (r"\.(?:diff|w_norm)$", "diff"),
        (r"\.(?:diff_b|b_norm)$", "diff_b"),
        (r"\.set_weight$", "set"),
        (r"\.reshape_weight$", "reshape"),
        (r"\.scale$", "scale"),
        (r"\.(?P<slot>oft_(?:blocks|diag|R)|boft_\w+|on_input|[ab][12]|lora_embedding_[AB])"
         rf"{_NAMED}{_WEIGHT}$", ""),
    )
)  # fmt: skip
"""The end of a name, and the slot of that tensor. The last row has kinds that are not supported."""

FORMATS = (
    LoraFormat("lycoris", r"^lycoris_"),
    LoraFormat("ai-toolkit", r"^diffusion_model\..*\.lora_[AB]\b"),
    LoraFormat("comfyui", r"^DOTTED"),
    LoraFormat("kohya", r"^FLAT"),
    LoraFormat(
        "diffusers-attn",
        r"(_lora\.(up|down)|\.lora_linear_layer\.(up|down))\.weight$",
        (
            (r"\.self_attn\.to_(q|k|v)_lora\.", r".self_attn.\1_proj.lora."),
            (r"\.self_attn\.to_out_lora\.", r".self_attn.out_proj.lora."),
            (r"\.processor\.(\w+)_lora\.", r".\1.lora."),
        ),
    ),
    LoraFormat("diffusers", r"^COMPONENT\."),
    LoraFormat("peft", r"\.lora_[AB]\b"),
    LoraFormat("other", r""),
)
"""The formats that serve every family, which come after those of the families. A file has the
first format of which one of its names has the mark. `FLAT` and `DOTTED` stand for the prefixes
that the families list, and `COMPONENT` for the names of their components."""


def find_format(names: Iterable[str], families: Sequence[NamedFamily] | None = None) -> LoraFormat:
    """Returns the format of a file with tensors of these names."""
    names = list(names)
    marked = (f for f in _formats(families) if any(re.search(f.mark, name) for name in names))
    return next(marked, FORMATS[-1])


def _formats(families: Sequence[NamedFamily] | None) -> list[LoraFormat]:
    known = every_family(families)
    prefixes = {text for f in known for texts in f.lora.prefixes.values() for text in texts}
    alternatives = {
        "FLAT": _any(text for text in prefixes if text.endswith("_")),
        "DOTTED": _any(text for text in prefixes if text.endswith(".")),
        "COMPONENT": _any(name for family in known for name in family.components),
    }
    generic = (
        dataclasses.replace(form, mark=re.sub("[A-Z]{4,}", lambda m: alternatives[m[0]], form.mark))
        for form in FORMATS
    )
    return [*(form for family in known for form in family.lora.formats), *generic]


def _any(texts: Iterable[str]) -> str:
    """A pattern for any of these texts, or for nothing where there are none."""
    return f"(?:{'|'.join(map(re.escape, sorted(set(texts)))) or '(?!)'})"


def prefixes_of(component: str, listed: Iterable[str]) -> tuple[tuple[str, bool], ...]:
    """Returns all prefixes of a component, and for each whether underscores stand for dots.

    **Arguments:**

    - `listed`: the prefixes that families list for the component.
    """
    generic = ((text.replace("NAME", component), flat) for text, flat in GENERIC)
    return (*((text, text.endswith("_")) for text in listed), *generic)


def split_name(form: LoraFormat, name: str) -> tuple[str, str] | None:
    """Splits a tensor's name into its module's, with the prefix, and its slot.

    Returns `None` for a tensor that is not one of an adapter.
    """
    for pattern, replacement in form.rewrites:
        name = re.sub(pattern, replacement, name)
    for pattern, slot in ENDINGS:
        if match := pattern.search(name):
            # some files have a stray underscore at the end of a module's name
            return name[: match.start()].rstrip("_."), slot or match["slot"]
    return None


def check_names(names: Iterable[str], form: LoraFormat, where: str) -> None:
    """**Raises:** `CheckpointError` where no name is one of an adapter's tensors."""
    names = list(names)
    if not any(split_name(form, name) for name in names):
        few = ", ".join(names[:3]) or "no tensors"
        raise CheckpointError(f"{where} is not a LoRA or one of its relatives: it has {few}.")
