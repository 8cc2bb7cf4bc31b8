"""How trainers spell the names of an adapter's tensors: data, and the few lines that read it.

A name is a prefix that says which component is meant, the name of a module in some published
layout with its dots or with underscores in their place, and an ending that says which tensor of
the adapter it is. Where underscores stand for dots nothing is guessed: the module is found among
the names that the model really has.
"""

import dataclasses
import re
from collections.abc import Iterable

from .._errors import CheckpointError


DENOISER = ("unet", "transformer")
TEXT = ("text_encoder", "text_encoder_2")
ANY = (*DENOISER, *TEXT)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What a name begins with, the components it may mean, and whether dots are underscores."""

    text: str
    components: tuple[str, ...]
    flat: bool = False


PREFIXES = (
    Prefix("lora_unet_", DENOISER, flat=True),
    Prefix("lora_transformer_", DENOISER, flat=True),
    Prefix("lora_te1_", ("text_encoder",), flat=True),
    Prefix("lora_te2_", ("text_encoder_2",), flat=True),
    Prefix("lora_te_", ("text_encoder",), flat=True),
    Prefix("lycoris_", DENOISER, flat=True),
    Prefix("unet.base_model.model.", ("unet",)),
    Prefix("transformer.base_model.model.", ("transformer",)),
    Prefix("text_encoder.base_model.model.", ("text_encoder",)),
    Prefix("text_encoder_2.base_model.model.", ("text_encoder_2",)),
    Prefix("base_model.model.", ANY),
    Prefix("model.diffusion_model.", DENOISER),
    Prefix("diffusion_model.", DENOISER),
    Prefix("unet.", ("unet",)),
    Prefix("transformer.", ("transformer",)),
    Prefix("text_encoder.", ("text_encoder",)),
    Prefix("text_encoder_2.", ("text_encoder_2",)),
    Prefix("text_encoders.clip_l.transformer.", ("text_encoder",)),
    Prefix("text_encoders.clip_g.transformer.", ("text_encoder_2",)),
    Prefix("text_encoders.t5xxl.transformer.", ("text_encoder_2",)),
    Prefix("text_encoders.clip_l.", ("text_encoder",)),
    Prefix("text_encoders.clip_g.", ("text_encoder_2",)),
    Prefix("text_encoders.t5xxl.", ("text_encoder_2",)),
    Prefix("", ANY),
    Prefix("", ANY, flat=True),
)
"""In order: the first under which the model has such a module is meant."""

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
"""What a name ends with, and the slot of that tensor. The last are of kinds that are not read."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A trainer's way to write names.

    **Fields:**

    - `mark`: some name of such a file matches it, and no format before this one is found.
    - `rewrite`: regular expressions and what they are replaced by, for names that are not those of
      a module. A number or range of numbers at the end of a module's name means those parts of a
      fused one.
    - `widens`: whether the first layer may take more channels than the model's does.
    """

    name: str
    mark: str
    rewrite: tuple[tuple[str, str], ...] = ()
    widens: bool = False


_XLABS = r"^(?:diffusion_model\.)?((?:double|single)_blocks\.\d+)\.processor\."
FORMATS = (
    Format(
        "xlabs",
        r"\.processor\.(qkv|proj)_lora\d?\.(down|up)",
        (
            (_XLABS + r"(qkv|proj)_lora1\.(down|up)\.weight$", r"\1.img_attn.\2.lora_\3.weight"),
            (_XLABS + r"(qkv|proj)_lora2\.(down|up)\.weight$", r"\1.txt_attn.\2.lora_\3.weight"),
            (_XLABS + r"qkv_lora\.(down|up)\.weight$", r"\1.linear1.0-2.lora_\2.weight"),
            (_XLABS + r"proj_lora\.(down|up)\.weight$", r"\1.linear2.lora_\2.weight"),
        ),
    ),
    Format(
        "bfl-control",
        r"^(double|single)_blocks\.\d+\..*norm\.(query|key)_norm\.scale$",
        ((r"_norm\.scale$", "_norm.scale.set_weight"),),
        widens=True,
    ),
    Format("onetrainer-bfl", r"^transformer\.(double|single)_blocks\.\d+\."),
    Format("onetrainer", r"^lora_transformer_"),
    Format("lycoris", r"^lycoris_"),
    Format("fal", r"^base_model\.model\.(double|single)_blocks\."),
    Format("bfl", r"^(double|single)_blocks\.\d+\..*\.lora_[AB]\."),
    Format("ai-toolkit", r"^diffusion_model\..*\.lora_[AB]\b"),
    Format("comfyui", r"^(diffusion_model|text_encoders)\."),
    Format("kohya", r"^lora_(unet|te\d?)_"),
    Format(
        "diffusers-attn",
        r"(_lora\.(up|down)|\.lora_linear_layer\.(up|down))\.weight$",
        (
            (r"\.self_attn\.to_(q|k|v)_lora\.", r".self_attn.\1_proj.lora."),
            (r"\.self_attn\.to_out_lora\.", r".self_attn.out_proj.lora."),
            (r"\.processor\.(\w+)_lora\.", r".\1.lora."),
        ),
    ),
    Format("diffusers", r"^(unet|transformer|text_encoder(_\d)?)\."),
    Format("peft", r"\.lora_[AB]\b"),
    Format("other", r""),
)
"""In order: the first of which a file has a mark is its format."""


def find_format(names: Iterable[str]) -> Format:
    """The format of a file with tensors of these names."""
    names = list(names)
    return next(f for f in FORMATS if any(re.search(f.mark, name) for name in names))


def split_name(form: Format, name: str) -> tuple[str, str] | None:
    """A tensor's name as that of its module, with the prefix, and its slot; `None`: not read."""
    for pattern, replacement in form.rewrite:
        name = re.sub(pattern, replacement, name)
    for pattern, slot in ENDINGS:
        if match := pattern.search(name):
            # some files have a stray underscore at the end of a module's name
            return name[: match.start()].rstrip("_."), slot or match["slot"]
    return None


def check_names(names: Iterable[str], where: str) -> None:
    """**Raises:** `CheckpointError` where no name is that of an adapter."""
    names = list(names)
    form = find_format(names) if names else FORMATS[-1]
    if not any(split_name(form, name) for name in names):
        few = ", ".join(names[:3]) or "no tensors"
        raise CheckpointError(f"{where} is not a LoRA or one of its relatives: it has {few}.")
