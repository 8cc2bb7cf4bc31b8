"""What a file holds, by the names and shapes in its header: never by the name of the file."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .._errors import CheckpointError
from ..checkpoint import Table, leaf_paths, read_table
from ..checkpoint.plan import Plan, Shape, compile_plan, condense
from ..hub import Part, Weights
from ..models import Component
from ..tensors import AbstractTensorSource, Subset, dequantised


@dataclasses.dataclass(frozen=True)
class Form:
    """One of the ways to name the tensors of a component.

    **Fields:**

    - `table`: its key table.
    - `marks`: a name that every such component has, after any prefix, or other spellings of it.
    - `absent`: a name that it must not have.
    """

    table: str
    marks: tuple[str, ...]
    absent: str | None = None

    def prefixes(self, names: Collection[str]) -> list[str]:
        """What precedes the names of each component of this form in a file."""
        found: list[str] = []
        taken: set[str] = set()
        for mark in self.marks:
            for name in names:
                if name in taken or not f".{name}".endswith(f".{mark}"):
                    continue
                taken.update(f"{name.removesuffix(mark)}{other}" for other in self.marks)
                taken.update(name for other in self.marks if mark.endswith(other))
                prefix = name.removesuffix(mark).removesuffix(".")
                if self.absent is None or join(prefix, self.absent) not in names:
                    found.append(prefix)
        return found


FORMS: Mapping[str, tuple[Form, ...]] = {
    "clip": (
        Form(
            "clip",
            (
                "text_model.embeddings.token_embedding.weight",
                "embeddings.token_embedding.weight",
            ),
        ),
        Form("clip_openclip", ("transformer.resblocks.0.attn.in_proj_weight",)),
    ),
    "controlnet": (
        Form("controlnet", ("controlnet_cond_embedding.conv_in.weight",)),
        Form("controlnet_ldm", ("input_hint_block.0.weight",)),
    ),
    "flux1_transformer": (
        Form("flux1_transformer", ("single_transformer_blocks.0.proj_mlp.weight",)),
        Form("flux1_transformer_bfl", ("double_blocks.0.img_mod.lin.weight",)),
    ),
    "t5": (Form("t5", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),),
    "unet": (
        Form("unet", ("up_blocks.0.resnets.0.time_emb_proj.weight",)),
        Form("unet_ldm", ("output_blocks.11.0.in_layers.0.weight",)),
        Form(
            "unet_sgm",
            ("output_blocks.8.0.in_layers.0.weight",),
            absent="output_blocks.9.0.in_layers.0.weight",
        ),
    ),
    "vae": (
        Form("vae", ("decoder.up_blocks.0.resnets.0.conv1.weight",)),
        Form("vae_ldm", ("decoder.up.0.block.0.conv1.weight",)),
    ),
}
"""The forms of each kind of component, which is called by the table of the published one."""

REST = "single_file"
"""The table whose `drop` lists what whole-model files hold besides their components."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A component in a file.

    **Fields:**

    - `kind`: the table of its published layout, such as `"unet"`.
    - `table`: that of the layout it is in, such as `"unet_ldm"`.
    - `prefix`: what precedes its names.
    - `names`: its tensors.
    """

    kind: str
    table: str
    prefix: str
    names: tuple[str, ...]

    def key_table(self) -> Table:
        """Its table, for this prefix alone."""
        return dataclasses.replace(read_table(self.table), prefix=(self.prefix,))

    def of(self, tensors: AbstractTensorSource) -> AbstractTensorSource:
        """Its tensors alone."""
        return Subset(tensors, self.names)


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def find_pieces(names: Collection[str]) -> tuple[list[Piece], list[str]]:
    """The components in a file, and the names that belong to none of them."""
    spots = [
        (prefix, kind, form.table)
        for kind, forms in FORMS.items()
        for form in forms
        for prefix in form.prefixes(names)
    ]
    owners = _owners(names, [prefix for prefix, _, _ in spots])
    pieces = []
    for prefix, kind, table in spots:
        pieces.append(Piece(kind, table, prefix, tuple(owners[prefix])))
    return pieces, owners[None]


def _owners(names: Collection[str], prefixes: Collection[str]) -> dict[str | None, list[str]]:
    """The names under each prefix, the longest that precedes a name; `None`: under none."""
    rest = read_table(REST)
    owners: dict[str | None, list[str]] = {prefix: [] for prefix in (*prefixes, None)}
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        owner = next((head for head in heads if head in owners), None)
        if owner is None and "" in owners and not rest.drops(name):
            owner = ""
        owners[owner].append(name)
    return owners


def choose(tensors: AbstractTensorSource, kind: str, skeleton: Any) -> Piece | None:
    """The component of a file that is most like a module; `None` where there is none of its kind.

    **Arguments:**

    - `kind`: the table of the component's published layout.
    """
    pieces = [piece for piece in find_pieces(tensors.tensors)[0] if piece.kind == kind]
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    return max(pieces, key=lambda piece: _likeness(tensors, piece, skeleton))


def _likeness(tensors: AbstractTensorSource, piece: Piece, skeleton: Any) -> float:
    """Which part of the module's tensors the file has, in their shapes."""
    file = {name: tensors.tensors[name].shape for name in piece.names}
    try:
        shapes = _plan(piece, skeleton, file).shapes
    except ValueError:  # a layout that this module does not have
        return 0.0
    return sum(file.get(name) == shape for name, shape in shapes.items()) / max(len(shapes), 1)


def _plan(piece: Piece, skeleton: Any, file: Mapping[str, Shape]) -> Plan:
    leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(skeleton).items()}
    return compile_plan(piece.key_table(), leaves, file, strict=False)


def locate(
    tensors: AbstractTensorSource, kind: str, skeleton: Any
) -> tuple[AbstractTensorSource, Table]:
    """The tensors of one component in a file of any layout, and the table to load them with.

    Where nothing is recognised these are all tensors and the published table, so that loading says
    what is missing.
    """
    tensors = dequantised(tensors)
    piece = choose(tensors, kind, skeleton)
    if piece is None:
        return tensors, read_table(kind)
    return piece.of(tensors), piece.key_table()


def claim(
    tensors: AbstractTensorSource, wanted: Mapping[str, tuple[str, Any]], name: str
) -> dict[str, Piece]:
    """Which component of a model a whole-model file has where; nothing of it may be left over.

    **Arguments:**

    - `wanted`: component -> the table of its published layout, and its skeleton.
    - `name`: what errors call the file.

    **Raises:** `CheckpointError`, one message with every component that does not fit and every
    tensor that belongs to none.
    """
    tensors = dequantised(tensors)
    pieces, rest = find_pieces(tensors.tensors)
    chosen: dict[str, Piece] = {}
    problems = []
    for component, (kind, skeleton) in wanted.items():
        candidates = [piece for piece in pieces if piece.kind == kind]
        rivals = sum(other == kind for other, _ in wanted.values())
        if len(candidates) == rivals == 1:
            best = candidates[0]
        else:
            likeness = {piece: _likeness(tensors, piece, skeleton) for piece in candidates}
            best = max(likeness, key=lambda piece: likeness[piece], default=None)
            if best is None or likeness[best] < 0.5:
                continue
        chosen[component] = best
        try:
            file = {tensor: tensors.tensors[tensor].shape for tensor in best.names}
            leaves = {path: tuple(leaf.shape) for path, leaf in leaf_paths(skeleton).items()}
            compile_plan(best.key_table(), leaves, file, name=component)
        except CheckpointError as error:
            problems.append(str(error).removesuffix("."))
        except ValueError:
            problems.append(f"{component}: it is in the layout of another model")
    drops = read_table(REST).drops
    left = [tensor for tensor in rest if not drops(tensor)]
    left += [n for p in pieces if p not in chosen.values() for n in p.names if not drops(n)]
    problems += [f"left over: {line}" for line in condense(left, tensors.tensors)]
    if not chosen:
        problems.append("it has none of the components " + ", ".join(wanted))
    if problems:
        held = describe(tensors)
        looks = "" if held is None else f" It looks like {held.summary}."
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{name} does not fit the model.{looks}\n  {lines}")
    return chosen


def claim_parts(
    weights: Weights, components: Mapping[str, Component], configs: Mapping[str, Any]
) -> dict[str, Part]:
    """The components that a single file of weights has; none where there is no such file.

    **Raises:** `CheckpointError` where it does not fit the model or has something left over.
    """
    if weights.single is None:
        return {}
    wanted = {
        name: (component.table, component.skeleton(configs[name]))
        for name, component in components.items()
    }
    found = claim(weights.single.tensors(), wanted, weights.single.file or "")
    return dict.fromkeys(found, weights.single)


def scheduler_fields(weights: Weights) -> Mapping[str, Any]:
    """`scheduler_config.json`, with what a single file says of it by marks of its own."""
    fields = weights.source.read_json("scheduler/scheduler_config.json")
    if weights.single is None:
        return fields
    names = weights.single.tensors().tensors
    marked = (change for mark, change in SCHEDULER_MARKS.items() if mark in names)
    return {**fields, **{key: value for change in marked for key, value in change.items()}}


SCHEDULER_MARKS: Mapping[str, Mapping[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
"""Tensors without meaning of their own, by which fine-tunes of SDXL tell how they were trained."""


@dataclasses.dataclass(frozen=True)
class Lookalikes:
    """A sort of models whose headers cannot be told apart.

    **Fields:**

    - `models`: those that it may be, the likeliest first; none where it is known and not supported.
    - `layout`: component -> the table and prefix of its original single file.
    """

    summary: str
    models: tuple[str, ...]
    layout: Mapping[str, tuple[str, str]]


_LDM = {"unet": ("unet_ldm", "model.diffusion_model"), "vae": ("vae_ldm", "first_stage_model")}
_FLUX = {
    "transformer": ("flux1_transformer_bfl", "model.diffusion_model"),
    "text_encoder": ("clip", "text_encoders.clip_l.transformer"),
    "text_encoder_2": ("t5", "text_encoders.t5xxl.transformer"),
    "vae": ("vae_ldm", "vae"),
}
SD1 = Lookalikes(
    "Stable Diffusion 1",
    ("sd15",),
    {**_LDM, "text_encoder": ("clip", "cond_stage_model.transformer")},
)
SD2 = Lookalikes(
    "Stable Diffusion 2",
    ("sd21", "sd21-base", "sd2-base", "sd-turbo"),
    {**_LDM, "text_encoder": ("clip_openclip", "cond_stage_model.model")},
)
SDXL = Lookalikes(
    "Stable Diffusion XL",
    ("sdxl", "sdxl-turbo"),
    {
        "unet": ("unet_sgm", "model.diffusion_model"),
        "vae": ("vae_ldm", "first_stage_model"),
        "text_encoder": ("clip", "conditioner.embedders.0.transformer"),
        "text_encoder_2": ("clip_openclip", "conditioner.embedders.1.model"),
    },
)
REFINER = Lookalikes("the refiner of Stable Diffusion XL", (), {})
FLUX_DEV = Lookalikes("FLUX.1 [dev]", ("flux-dev",), _FLUX)
FLUX_SCHNELL = Lookalikes("FLUX.1 [schnell]", ("flux-schnell",), _FLUX)

KINDS = (SD1, SD2, SDXL, REFINER, FLUX_DEV, FLUX_SCHNELL)

UNETS = {(768, None): SD1, (1024, None): SD2, (2048, 2816): SDXL, (1280, 2560): REFINER}
"""The length of a token's state and of the added conditioning -> what has a UNet for it."""

GUIDANCE = ("guidance_in.in_layer.weight", "guidance_embedder.linear_1.weight")
ADDED = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")


def describe(tensors: AbstractTensorSource) -> Lookalikes | None:
    """What model a file is of, by its denoiser; `None` where it has none that is known."""
    for piece in find_pieces(tensors.tensors)[0]:
        shapes = {name: tensors.tensors[name].shape for name in piece.names}
        if piece.kind == "flux1_transformer":
            return FLUX_DEV if any(name.endswith(GUIDANCE) for name in shapes) else FLUX_SCHNELL
        if piece.kind in ("unet", "controlnet"):
            context = next(_widths(shapes, ("attn2.to_k.weight",)), None)
            return UNETS.get((context, next(_widths(shapes, ADDED), None)))  # pyright: ignore
    return None


def _widths(shapes: Mapping[str, Shape], ends: Sequence[str]) -> Iterator[int]:
    yield from (s[1] for name, s in shapes.items() if name.endswith(tuple(ends)) and len(s) > 1)
