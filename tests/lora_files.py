"""Tiny adapters in every format, with what each must change computed from the definition."""

import functools
import json
import re
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers import fake_tensor

from eqxdiff.checkpoint import export_tensors, read_table
from eqxdiff.checkpoint.load import dotted
from eqxdiff.lora import Adapter, parse_adapter
from eqxdiff.models import find_model
from eqxdiff.nn import Adapted
from eqxdiff.tensors import InMemory


DEEPER = {"layers_per_block": 2, "transformer_layers_per_block": [1, 2, 2]}
"""As the real ones have it: the names of single files count on two layers a block."""


@functools.cache
def components(model: str) -> dict[str, eqx.Module]:
    """The denoiser and text encoders of a tiny model; every number depends on its name alone."""
    family, _ = find_model(model)
    files = family.example(model)
    modules = {}
    for name, component in family.components.items():
        if component.stage == "vae":
            continue
        fields = json.loads(files[f"{name}/config.json"])
        if name == "unet":
            fields |= DEEPER if model == "sdxl" else {"layers_per_block": 2}
        skeleton = component.skeleton(component.parse(fields))

        def fill(path, leaf, name=name):
            return jnp.asarray(fake_tensor(f"{name}.{dotted(path)}", leaf.shape), leaf.dtype)

        modules[name] = jax.tree_util.tree_map_with_path(fill, skeleton)
    return modules


def table_of(model: str, component: str):
    return read_table(find_model(model)[0].components[component].table)


@functools.cache
def base_tensors(model: str) -> dict[str, np.ndarray]:
    return exported(model, components(model))


def exported(model: str, modules: dict[str, eqx.Module]) -> dict[str, np.ndarray]:
    """All tensors of some components under the names of diffusers, `component:name`."""
    return {
        f"{component}:{name}": array.copy()
        for component, module in modules.items()
        for name, array in export_tensors(module, table_of(model, component))
    }


def realized(model):
    """A model with adapters at run time as one whose weights are what each layer computes with.

    By the definition of `Adapted`, in numpy.
    """

    def weights(node: Adapted, weight, bias, layer: int | None):
        def part(name: str):
            array = getattr(node, name)
            own = array if array is None or layer is None else array[layer]
            return own if own is None else np.asarray(own, np.float64)

        scale, total = part("scale"), np.asarray(weight, np.float64)
        shape = total.shape
        own, total = total.reshape(shape[0], *shape[1:2], -1), total.reshape(shape[0], -1)
        for slot, number in enumerate(scale):
            if node.up is not None:
                total = total + number * part("up")[:, slot] @ part("down")[slot]
            if node.rows is not None:
                rows = part("rows")[slot][:, None, None] * own
                total = total + number * rows.reshape(total.shape)
            if node.columns is not None:
                columns = part("columns")[slot][None, :, None] * own
                total = total + number * columns.reshape(total.shape)
            if node.change is not None:
                total = total + number * part("change")[slot].reshape(total.shape)
            if node.bias_change is not None:
                bias = (0 if bias is None else bias) + number * part("bias_change")[slot]
        return total.reshape(shape).astype(np.float32), bias

    def bake(node):
        if not isinstance(node, Adapted):
            return node
        weight, bias = node.inner.weight, vars(node.inner).get("bias")
        if node.scale.ndim == 1:
            weight, bias = weights(node, weight, bias, None)
        else:
            layers = range(node.scale.shape[0])
            rows = [weights(node, weight[i], None if bias is None else bias[i], i) for i in layers]
            weight = np.stack([row[0] for row in rows])
            bias = None if rows[0][1] is None else np.stack([row[1] for row in rows])
        inner = eqx.tree_at(lambda n: n.weight, node.inner, jnp.asarray(weight))
        if bias is None:
            return inner
        bias = jnp.asarray(bias, jnp.float32)
        return eqx.tree_at(lambda n: n.bias, inner, bias, is_leaf=lambda x: x is None)

    return jax.tree.map(bake, model, is_leaf=lambda node: isinstance(node, Adapted))


def noise(name: str, *shape: int) -> np.ndarray:
    """Float32 of unit variance that depends on a name."""
    return fake_tensor(f"noise {name}", (1, *shape), np.sqrt(max(np.prod(shape), 1)))[0]


class Draft:
    """An adapter file in the making, and the changes that it must make.

    - `file`: name -> tensor.
    - `expected`: `component:tensor`, as diffusers names it, -> change at strength 1, in float64.
    """

    def __init__(self, model: str):
        self.model = model
        self.base = base_tensors(model)
        self.shapes = {name: array.shape for name, array in self.base.items()}
        self.file: dict[str, np.ndarray] = {}
        self.expected: dict[str, np.ndarray] = {}
        self.metadata: dict[str, str] = {}
        self.config: dict | None = None

    def adapter(self) -> Adapter:
        source = InMemory(self.file)
        return parse_adapter(
            source, name="tiny.safetensors", metadata=self.metadata, config=self.config
        )

    def shape(self, targets: str | Sequence[str]) -> tuple[int, ...]:
        """Of a tensor of the file whose rows are those of the targets, one after another."""
        targets = [targets] if isinstance(targets, str) else targets
        shapes = [self.shapes[f"{target}.weight"] for target in targets]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def expect(self, targets: str | Sequence[str], delta: np.ndarray, ending: str = "weight"):
        """Each target takes its rows of the change."""
        targets = [targets] if isinstance(targets, str) else targets
        start = 0
        for target in targets:
            shape = self.shapes[f"{target}.{ending}"]
            rows = delta[start : start + shape[0]].astype(np.float64).reshape(shape)
            before = self.expected.get(f"{target}.{ending}", 0)
            self.expected[f"{target}.{ending}"] = before + rows
            start += shape[0]

    def lora(
        self,
        stem: str,
        targets: str | Sequence[str],
        *,
        style: str = "kohya",
        alpha: float | None = None,
        rank: int = 3,
        factor: float | None = None,
    ) -> None:
        """A plain LoRA. `alpha` is written beside it; `factor` is what else it is multiplied by."""
        down_name, up_name = STYLES[style]
        out, *rest = self.shape(targets)
        down = noise(f"{stem} down", rank, *rest) / np.float32(np.sqrt(np.prod(rest)))
        up = noise(f"{stem} up", out, rank, *[1] * (len(rest) - 1))
        self.file[stem + down_name], self.file[stem + up_name] = down, up
        if alpha is not None:
            self.file[f"{stem}.alpha"] = np.array(alpha, np.float32)
        if factor is None:
            factor = 1 if alpha is None else alpha / rank
        wide = lambda a: a.astype(np.float64).reshape(a.shape[0], -1)
        self.expect(targets, factor * (wide(up) @ wide(down)))

    def weight(self, targets: str | Sequence[str]) -> np.ndarray:
        """The base weight in the file's layout, in float64."""
        targets = [targets] if isinstance(targets, str) else targets
        parts = [self.base[f"{target}.weight"] for target in targets]
        return np.concatenate(parts).astype(np.float64)


STYLES = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "named": (".lora_A.default.weight", ".lora_B.default.weight"),
    "bare": (".lora_A", ".lora_B"),
    "plain": (".lora_down", ".lora_up"),
    "dotted": (".lora.down.weight", ".lora.up.weight"),
    "attn": ("_lora.down.weight", "_lora.up.weight"),
    "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}

DOUBLE, SINGLE = "transformer:transformer_blocks.1", "transformer:single_transformer_blocks.1"
QKV = [f"{DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
TXT_QKV = [f"{DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
LINEAR1 = [f"{SINGLE}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
BFL = {
    "double_blocks.1.img_attn.qkv": QKV,
    "double_blocks.1.txt_attn.qkv": TXT_QKV,
    "double_blocks.1.img_attn.proj": f"{DOUBLE}.attn.to_out.0",
    "double_blocks.1.txt_attn.proj": f"{DOUBLE}.attn.to_add_out",
    "double_blocks.1.img_mlp.0": f"{DOUBLE}.ff.net.0.proj",
    "double_blocks.1.img_mlp.2": f"{DOUBLE}.ff.net.2",
    "double_blocks.1.txt_mlp.0": f"{DOUBLE}.ff_context.net.0.proj",
    "double_blocks.1.txt_mlp.2": f"{DOUBLE}.ff_context.net.2",
    "double_blocks.1.img_mod.lin": f"{DOUBLE}.norm1.linear",
    "double_blocks.1.txt_mod.lin": f"{DOUBLE}.norm1_context.linear",
    "single_blocks.1.linear1": LINEAR1,
    "single_blocks.1.linear2": f"{SINGLE}.proj_out",
    "single_blocks.1.modulation.lin": f"{SINGLE}.norm.linear",
    "final_layer.linear": "transformer:proj_out",
    "img_in": "transformer:x_embedder",
    "txt_in": "transformer:context_embedder",
    "time_in.in_layer": "transformer:time_text_embed.timestep_embedder.linear_1",
    "vector_in.out_layer": "transformer:time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "transformer:time_text_embed.guidance_embedder.linear_1",
}
"""Modules of the original FLUX.1 and the modules of diffusers whose rows they are."""

KLEIN = {
    "double_blocks.1.img_attn.qkv": QKV,
    "double_blocks.1.txt_attn.qkv": TXT_QKV,
    "double_blocks.1.img_attn.proj": f"{DOUBLE}.attn.to_out.0",
    "double_blocks.1.txt_attn.proj": f"{DOUBLE}.attn.to_add_out",
    "double_blocks.1.img_mlp.0": f"{DOUBLE}.ff.linear_in",
    "double_blocks.1.img_mlp.2": f"{DOUBLE}.ff.linear_out",
    "double_blocks.1.txt_mlp.0": f"{DOUBLE}.ff_context.linear_in",
    "double_blocks.1.txt_mlp.2": f"{DOUBLE}.ff_context.linear_out",
    "single_blocks.1.linear1": f"{SINGLE}.attn.to_qkv_mlp_proj",
    "single_blocks.1.linear2": f"{SINGLE}.attn.to_out",
    "final_layer.linear": "transformer:proj_out",
    "img_in": "transformer:x_embedder",
    "txt_in": "transformer:context_embedder",
    "time_in.in_layer": "transformer:time_guidance_embed.timestep_embedder.linear_1",
    "double_stream_modulation_img.lin": "transformer:double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "transformer:double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "transformer:single_stream_modulation.linear",
}
"""Modules of the original FLUX.2 and the modules of diffusers whose rows they are."""

FLUX = [f"{DOUBLE}.attn.to_q", f"{DOUBLE}.ff.net.0.proj", f"{DOUBLE}.norm1.linear"]
FLUX += [f"{SINGLE}.attn.to_k", f"{SINGLE}.proj_mlp", f"{SINGLE}.proj_out"]
FLUX += ["transformer:x_embedder", "transformer:norm_out.linear"]

CLIP = "text_encoder:text_model.encoder.layers.2"
T5 = "text_encoder_2:encoder.block.1.layer"
TEXT = [f"{CLIP}.self_attn.q_proj", f"{CLIP}.mlp.fc2"]
T5_NAMES = [f"{T5}.0.SelfAttention.q", f"{T5}.0.SelfAttention.o"]
T5_NAMES += [f"{T5}.1.DenseReluDense.wi_0", f"{T5}.1.DenseReluDense.wo"]

ATTENTION = "unet:down_blocks.1.attentions.0"
UNET = [
    f"{ATTENTION}.transformer_blocks.0.attn1.to_q",
    f"{ATTENTION}.transformer_blocks.0.attn2.to_out.0",
    f"{ATTENTION}.transformer_blocks.0.ff.net.0.proj",
    f"{ATTENTION}.transformer_blocks.0.ff.net.2",
    f"{ATTENTION}.proj_in",
    "unet:mid_block.resnets.1.conv2",
    "unet:up_blocks.1.resnets.0.conv_shortcut",
    "unet:up_blocks.1.upsamplers.0.conv",
    "unet:time_embedding.linear_1",
    "unet:conv_in",
]
SGM = {
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": UNET[0],
    "input_blocks.7.1.transformer_blocks.1.attn2.to_out.0": (
        "unet:down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_out.0"
    ),
    "input_blocks.5.0.in_layers.2": "unet:down_blocks.1.resnets.1.conv1",
    "input_blocks.3.0.op": "unet:down_blocks.0.downsamplers.0.conv",
    "middle_block.1.proj_in": "unet:mid_block.attentions.0.proj_in",
    "middle_block.2.out_layers.3": "unet:mid_block.resnets.1.conv2",
    "output_blocks.2.2.conv": "unet:up_blocks.0.upsamplers.0.conv",
    "output_blocks.4.1.transformer_blocks.0.ff.net.0.proj": (
        "unet:up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "output_blocks.6.0.skip_connection": "unet:up_blocks.2.resnets.0.conv_shortcut",
    "input_blocks.1.0.emb_layers.1": "unet:down_blocks.0.resnets.0.time_emb_proj",
    "time_embed.2": "unet:time_embedding.linear_2",
    "label_emb.0.0": "unet:add_embedding.linear_1",
    "input_blocks.0.0": "unet:conv_in",
    "out.2": "unet:conv_out",
}
"""Modules of the original SDXL and the modules of diffusers that they are."""


def flat(target: str) -> str:
    return target.partition(":")[2].replace(".", "_")


def swapped_halves(draft: Draft, stem: str, style: str, alpha: float | None = None) -> None:
    """The last modulation is (shift, scale) in the file and (scale, shift) in diffusers."""
    target = "transformer:norm_out.linear"
    draft.lora(stem, target, style=style, alpha=alpha)
    halves = np.split(draft.expected[f"{target}.weight"], 2)
    draft.expected[f"{target}.weight"] = np.concatenate(halves[::-1])


def kohya_flux(draft: Draft) -> None:
    for i, (name, targets) in enumerate(BFL.items()):
        draft.lora(f"lora_unet_{name.replace('.', '_')}", targets, alpha=1 + i / 4, rank=2 + i % 3)
    swapped_halves(draft, "lora_unet_final_layer_adaLN_modulation_1", "kohya", alpha=1)
    for target in TEXT:
        draft.lora(f"lora_te1_{flat(target)}", target, alpha=2)
    for target in T5_NAMES:
        draft.lora(f"lora_te2_{flat(target)}", target, alpha=2)


def dotted_bfl(prefix: str, style: str) -> Callable[[Draft], None]:
    def make(draft: Draft) -> None:
        for name, targets in BFL.items():
            draft.lora(f"{prefix}{name}", targets, style=style)
        swapped_halves(draft, f"{prefix}final_layer.adaLN_modulation.1", style)

    return make


def klein(prefix: str, style: str, alpha: float | None = None) -> Callable[[Draft], None]:
    """FLUX.2 by the original names; with a prefix that ends in `_` dots are underscores."""

    def make(draft: Draft) -> None:
        for name, targets in KLEIN.items():
            stem = name.replace(".", "_") if prefix.endswith("_") else name
            draft.lora(f"{prefix}{stem}", targets, style=style, alpha=alpha)
        last = "final_layer.adaLN_modulation.1"
        stem = last.replace(".", "_") if prefix.endswith("_") else last
        swapped_halves(draft, f"{prefix}{stem}", style, alpha)

    return make


def klein_diffusers(prefix: str, *, cut: bool = False) -> Callable[[Draft], None]:
    """FLUX.2 by the names of diffusers; `cut`: as some exports begin the names of its blocks."""

    def make(draft: Draft) -> None:
        for target in (QKV[0], f"{DOUBLE}.ff.linear_in", f"{SINGLE}.attn.to_qkv_mlp_proj"):
            name = target.partition(":")[2]
            name = name.replace("transformer_blocks", "sformer_blocks", 1) if cut else name
            name = name.replace("single_sformer", "single_transformer")
            draft.lora(f"{prefix}{name}", target, style="peft")

    return make


def klein_lokr(draft: Draft) -> None:
    """ai-toolkit's LoKr of fused projections, whose product each projection takes its rows of."""
    for name in ("double_blocks.1.txt_attn.qkv", "single_blocks.1.linear1"):
        out, inner = draft.shape(KLEIN[name])
        one, two = noise(f"{name} one", 3, 4), noise(f"{name} two", out // 3, inner // 4)
        draft.file |= {
            f"diffusion_model.{name}.lokr_w1": one,
            f"diffusion_model.{name}.lokr_w2": two,
        }
        draft.expect(KLEIN[name], np.kron(one.astype(np.float64), two.astype(np.float64)))


def xlabs(draft: Draft) -> None:
    names = {
        "double_blocks.1.processor.qkv_lora1": QKV,
        "double_blocks.1.processor.qkv_lora2": TXT_QKV,
        "double_blocks.1.processor.proj_lora1": f"{DOUBLE}.attn.to_out.0",
        "double_blocks.1.processor.proj_lora2": f"{DOUBLE}.attn.to_add_out",
        "single_blocks.1.processor.qkv_lora": LINEAR1[:3],
        "single_blocks.1.processor.proj_lora": f"{SINGLE}.proj_out",
    }
    for name, targets in names.items():
        draft.lora(name, targets, style="xlabs")


STYLES["xlabs"] = (".down.weight", ".up.weight")


def onetrainer(draft: Draft) -> None:
    for target in FLUX:
        draft.lora(f"lora_transformer_{flat(target)}", target, alpha=1)
    draft.lora(f"lora_te1_{flat(TEXT[0])}", TEXT[0], alpha=1)
    draft.lora(f"lora_te2_{flat(T5_NAMES[0])}", T5_NAMES[0], alpha=1)


def onetrainer_bfl(draft: Draft) -> None:
    for i, target in enumerate(QKV):
        draft.lora(f"transformer.double_blocks.1.img_attn.qkv.{i}", target, alpha=1)
    for i, target in enumerate(LINEAR1):
        draft.lora(f"transformer.single_blocks.1.linear1.{i}", target, alpha=1)
    draft.lora("transformer.double_blocks.1.img_mlp.0", BFL["double_blocks.1.img_mlp.0"], alpha=1)


def diffusers_flux(style: str) -> Callable[[Draft], None]:
    def make(draft: Draft) -> None:
        for target in FLUX:
            draft.lora(target.replace(":", "."), target, style=style)
        for target in (*TEXT, *T5_NAMES):
            draft.lora(target.replace(":", "."), target, style=style)

    return make


def diffusers_metadata(draft: Draft) -> None:
    """Alpha in the header, by default and for some modules, and the square root of the rank."""
    for target in FLUX:
        factor = (8 if target == FLUX[0] else 6) / 3
        draft.lora(target.replace(":", "."), target, style="peft", factor=factor)
    draft.lora(TEXT[0].replace(":", "."), TEXT[0], style="peft", factor=6 / np.sqrt(3))
    text = {"text_encoder.lora_alpha": 6, "text_encoder.use_rslora": True}
    pattern = {"transformer_blocks.1.attn.to_q": 8}
    names = [target.partition(":")[2] for target in FLUX]
    fields = {"r": 3, "lora_alpha": 6, "alpha_pattern": pattern, "target_modules": names}
    fields = {f"transformer.{name}": value for name, value in fields.items()} | text
    draft.metadata["lora_adapter_metadata"] = json.dumps(fields)


def peft(prefix: str) -> Callable[[Draft], None]:
    """As PEFT itself saves it: alpha is in a config beside the file."""

    def make(draft: Draft) -> None:
        for target in UNET[:5]:
            stem = f"{prefix}{target.partition(':')[2]}"
            draft.lora(stem, target, style="peft", factor=5 / 3)
        draft.config = {"lora_alpha": 5, "r": 3, "peft_type": "LORA"}

    return make


def kohya_diffusers(draft: Draft) -> None:
    """SD 1.5 as kohya writes it, and LCM's for SDXL: the names of diffusers."""
    for i, target in enumerate(UNET):
        draft.lora(f"lora_unet_{flat(target)}", target, alpha=1 + i)
    for target in TEXT:
        draft.lora(f"lora_te_{flat(target)}", target, alpha=2)


def kohya_sdxl(draft: Draft) -> None:
    for i, (name, target) in enumerate(SGM.items()):
        draft.lora(f"lora_unet_{name.replace('.', '_')}", target, alpha=1 + i)
    second = "text_encoder_2:text_model.encoder.layers.1.mlp.fc1"
    draft.lora(f"lora_te1_{flat(TEXT[0])}", TEXT[0], alpha=2)
    draft.lora(f"lora_te2_{flat(second)}", second, alpha=2)
    draft.lora("lora_te2_text_projection", "text_encoder_2:text_projection", alpha=2)


def comfyui_sdxl(draft: Draft) -> None:
    for name, target in SGM.items():
        draft.lora(f"diffusion_model.{name}", target, style="plain")
    draft.lora(f"text_encoders.clip_l.transformer.{TEXT[0][13:]}", TEXT[0], style="bare")
    second = "text_encoder_2:text_model.encoder.layers.1.mlp.fc1"
    draft.lora(f"text_encoders.clip_g.transformer.{second[15:]}", second)


def comfyui_flux(draft: Draft) -> None:
    for name, targets in list(BFL.items())[:6]:
        draft.lora(f"diffusion_model.{name}", targets, alpha=1)
    draft.lora(f"text_encoders.clip_l.transformer.{TEXT[0][13:]}", TEXT[0], alpha=1)
    draft.lora(f"text_encoders.t5xxl.transformer.{T5_NAMES[0][15:]}", T5_NAMES[0], alpha=1)


def attention_processors(draft: Draft) -> None:
    """As diffusers wrote them before PEFT: processors, and another spelling for text encoders."""
    block = f"{ATTENTION}.transformer_blocks.0.attn1"
    for name in ("to_q", "to_k", "to_v", "to_out"):
        target = f"{block}.{name}.0" if name == "to_out" else f"{block}.{name}"
        draft.lora(f"{block.replace(':', '.')}.processor.{name}", target, style="attn")
    draft.lora(f"{CLIP.replace(':', '.')}.self_attn.to_k", f"{CLIP}.self_attn.k_proj", style="attn")
    out = f"{CLIP}.self_attn.out_proj"
    draft.lora(f"{CLIP.replace(':', '.')}.self_attn.to_out", out, style="attn")
    draft.lora(TEXT[1].replace(":", "."), TEXT[1], style="linear")


def stray_underscores(draft: Draft) -> None:
    """As TheLastBen's notebook writes alpha."""
    target = UNET[0]
    draft.lora(f"lora_unet_{flat(target)}", target, alpha=1)
    stem = f"lora_unet_{flat(target)}"
    draft.file[f"{stem}_.alpha"] = draft.file.pop(f"{stem}.alpha")


def scales(draft: Draft) -> None:
    """A scale in place of alpha over rank, as stable-diffusion.cpp reads it."""
    draft.lora(f"lora_unet_{flat(UNET[0])}", UNET[0], factor=0.25)
    draft.file[f"lora_unet_{flat(UNET[0])}.scale"] = np.array([0.25], np.float32)


def network_alpha(draft: Draft) -> None:
    """Alpha in kohya's metadata alone."""
    draft.lora(f"lora_unet_{flat(UNET[0])}", UNET[0], factor=1.5 / 3)
    draft.metadata["ss_network_alpha"] = "1.5"


def diffusers_unet(draft: Draft) -> None:
    for target in (*UNET, *TEXT):
        draft.lora(target.replace(":", "."), target, style="peft")


def simpletuner(draft: Draft) -> None:
    """LyCORIS's LoKr under the names of diffusers."""
    target = FLUX[0]
    out, inner = draft.shape(target)
    one, two = noise("one", 4, 4), noise("two", out // 4, inner // 4)
    stem = f"lycoris_{flat(target)}"
    draft.file |= {f"{stem}.lokr_w1": one, f"{stem}.lokr_w2": two}
    draft.file[f"{stem}.alpha"] = np.float32(7)  # of no meaning where nothing is factored
    draft.expect(target, np.kron(one.astype(np.float64), two.astype(np.float64)))


def fused_peft(draft: Draft) -> None:
    """PEFT's `lora_bias` on FLUX.1 as its authors name it."""
    dotted_bfl("", "peft")(draft)


def both_layouts(draft: Draft) -> None:
    """The same layer under the names of two layouts counts once."""
    name, target = next(iter(SGM.items()))
    draft.lora(f"lora_unet_{name.replace('.', '_')}", target, alpha=1)
    for tensor in list(draft.file):
        ending = re.sub(r"^[^.]*", "", tensor)
        draft.file[f"lora_unet_{flat(target)}{ending}"] = draft.file[tensor]


FORMATS: dict[str, tuple[str, str, Callable[[Draft], None]]] = {
    "kohya-flux": ("flux-dev", "kohya", kohya_flux),
    "kohya-sd15": ("sd15", "kohya", kohya_diffusers),
    "kohya-sdxl": ("sdxl", "kohya", kohya_sdxl),
    "kohya-sdxl-diffusers": ("sdxl", "kohya", kohya_diffusers),
    "kohya-both-layouts": ("sdxl", "kohya", both_layouts),
    "kohya-network-alpha": ("sd15", "kohya", network_alpha),
    "kohya-stray-underscores": ("sd15", "kohya", stray_underscores),
    "sd.cpp-scale": ("sd15", "kohya", scales),
    "comfyui-flux": ("flux-dev", "comfyui", comfyui_flux),
    "comfyui-sdxl": ("sdxl", "comfyui", comfyui_sdxl),
    "ai-toolkit": ("flux-dev", "ai-toolkit", dotted_bfl("diffusion_model.", "peft")),
    "fal": ("flux-dev", "fal", dotted_bfl("base_model.model.", "peft")),
    "bfl": ("flux-dev", "bfl", fused_peft),
    "xlabs": ("flux-dev", "xlabs", xlabs),
    "onetrainer": ("flux-dev", "onetrainer", onetrainer),
    "onetrainer-bfl": ("flux-dev", "onetrainer-bfl", onetrainer_bfl),
    "simpletuner": ("flux-dev", "lycoris", simpletuner),
    "diffusers-flux": ("flux-dev", "diffusers", diffusers_flux("peft")),
    "diffusers-flux-named": ("flux-dev", "diffusers", diffusers_flux("named")),
    "diffusers-flux-dotted": ("flux-dev", "diffusers", diffusers_flux("dotted")),
    "diffusers-flux-bare": ("flux-dev", "diffusers", diffusers_flux("bare")),
    "kohya-klein": ("flux2-klein-4b", "kohya", klein("lora_unet_", "kohya", 2)),
    "comfyui-klein": ("flux2-klein-4b", "comfyui", klein("diffusion_model.", "kohya", 2)),
    "ai-toolkit-klein": ("flux2-klein-4b", "ai-toolkit", klein("diffusion_model.", "peft")),
    "bfl-klein": ("flux2-klein-4b", "bfl", klein("", "peft")),
    "peft-klein": ("flux2-klein-4b", "fal", klein("base_model.model.", "peft")),
    "diffusers-klein": ("flux2-klein-4b", "diffusers", klein_diffusers("transformer.")),
    "cut-names-klein": (
        "flux2-klein-4b",
        "cut-names",
        klein_diffusers("diffusion_model.", cut=True),
    ),
    "ai-toolkit-lokr-klein": ("flux2-klein-4b", "comfyui", klein_lokr),
    "diffusers-metadata": ("flux-dev", "diffusers", diffusers_metadata),
    "diffusers-unet": ("sd15", "diffusers", diffusers_unet),
    "diffusers-attn": ("sd15", "diffusers-attn", attention_processors),
    "peft": ("sd15", "peft", peft("base_model.model.")),
    "peft-unet": ("sd15", "diffusers", peft("unet.base_model.model.")),
    "peft-no-prefix": ("sd15", "peft", peft("")),
}
"""Name -> the model, what the format is reported as, and how to draft such a file."""


AGREED = (
    "kohya-flux",
    "kohya-sdxl",
    "kohya-sd15",
    "comfyui-flux",
    "xlabs",
    "diffusers-flux",
    "diffusers-flux-dotted",
    "diffusers-metadata",
    "diffusers-unet",
    "diffusers-attn",
    "peft-dora",
)
"""Formats that diffusers reads rightly, or does in part."""

LEFT_OUT = {
    "kohya-flux": r"^lora_te|final_layer|_in_layer|_in_out_layer|_img_in|_txt_in|linear1",
}
"""What diffusers reads wrongly, not at all, or at the full size of FLUX.1 only."""


def peft_dora(draft: Draft) -> None:
    for target in FLUX[:-1]:
        stem = target.replace(":", ".")
        draft.lora(stem, target, style="peft")
        norms = np.linalg.norm(draft.weight(target), axis=1)
        magnitude = norms * (1 + 0.2 * noise(f"m {stem}", norms.size))
        draft.file[f"{stem}.lora_magnitude_vector"] = magnitude.astype(np.float32)


def agreed(case: str) -> Draft:
    """A draft for which diffusers and the definition should agree.

    Where it finds out from the names how many blocks there are, both blocks are in the file. All
    alphas are one: those of one module it applies to others whose names end alike.
    """
    model, _, make = ("flux-dev", "", peft_dora) if case == "peft-dora" else FORMATS[case]
    draft = Draft("sdxl" if model == "sd15" else model)
    make(draft)
    draft.expected = {}
    for name in list(draft.file):
        if re.search(LEFT_OUT.get(case, "^$"), name):
            del draft.file[name]
        elif name.endswith("alpha"):
            draft.file[name] = np.array(2, np.float32)
    if case in LEFT_OUT:
        for name, array in list(draft.file.items()):
            first = re.sub(r"(_blocks[._])1([._])", r"\g<1>0\2", name)
            draft.file.setdefault(first, array if "alpha" in name else array[::-1] * 0.5)
    return draft


def denoiser_inputs(model: str) -> dict[str, np.ndarray]:
    """What the denoisers are compared on."""
    if model.startswith("flux"):
        shapes = {"img": (6, 16), "txt": (5, 32), "pooled": (32,)}
    else:
        shapes = {"x": (8, 8, 4), "context": (7, 32)}
        shapes |= {"text_embeds": (10,)} if model == "sdxl" else {}
    return {name: noise(name, *shape) for name, shape in shapes.items()}
