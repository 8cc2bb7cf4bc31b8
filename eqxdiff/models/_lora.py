"""How published LoRAs name the layers of a family: plain data, which `eqxdiff.lora` reads."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class LoraFormat:
    """A trainer's way to name the tensors of an adapter.

    **Fields:**

    - `name`: the name that reports give the format.
    - `mark`: a regular expression. A file is of the first format whose mark one of its names has.
    - `rewrites`: regular expressions and their replacements, for names that do not contain the name
      of a module. A number or a range of numbers at the end of a module's name selects parts of a
      fused module: `linear1.0-2` is the first three.
    - `widens`: whether an adapter may add input channels to the first layer.
    """

    name: str
    mark: str
    rewrites: tuple[tuple[str, str], ...] = ()
    widens: bool = False


@dataclasses.dataclass(frozen=True)
class LoraBase:
    """A model, and the layers that show that an adapter is for it.

    **Fields:**

    - `name`: the model's name, as users know it.
    - `modules`: a regular expression that finds such a layer by its name in the adapter's file.
    - `inputs`: the number of inputs that the layer must have; `None` accepts any number.
    """

    name: str
    modules: str
    inputs: int | None = None


@dataclasses.dataclass(frozen=True)
class LoraNames:
    """What a family knows about its published LoRAs.

    **Fields:**

    - `prefixes`: component -> the prefixes that published files put before the names of its
      modules. After a prefix that ends in `_` the name has underscores for dots. The component's
      own name and the prefixes of PEFT need not be listed.
    - `formats`: the formats that exist for this family alone.
    - `bases`: the models of the family, the most specific first.
    """

    prefixes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    formats: tuple[LoraFormat, ...] = ()
    bases: tuple[LoraBase, ...] = ()


DENOISER = ("lora_unet_", "lycoris_", "model.diffusion_model.", "diffusion_model.")
"""The prefixes that trainers give the denoiser of any family."""

CLIP_L = ("lora_te1_", "lora_te_", "text_encoders.clip_l.transformer.", "text_encoders.clip_l.")
"""The prefixes of OpenAI's CLIP, the first text encoder of several families."""
