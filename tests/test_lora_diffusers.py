"""Where diffusers and PEFT are right, ours is the same; where they are not, the definition is."""

from functools import cache

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES, relative_error
from lora_files import (
    AGREED,
    BFL,
    FLUX,
    FORMATS,
    SGM,
    T5_NAMES,
    Draft,
    agreed,
    components,
    denoiser_inputs,
    flat,
    noise,
    realized,
    swapped_halves,
)
from test_lora_formats import check_changes
from test_lora_kinds import dora, loha, lokr

from eqxdiff import lora
from eqxdiff.models.unet.network import AddedConditioning


@cache
def read_reference():
    with np.load(FIXTURES / "lora.npz") as file:
        return dict(file)


@eqx.filter_jit
def call(module, x):
    if "img" in x:
        ids = jnp.arange(33.0).reshape(11, 3)
        numbers = jnp.float32(500), jnp.float32(3.5)
        return module(x["img"], x["txt"], x["pooled"], *numbers, ids)
    added = None
    if "text_embeds" in x:
        ids = jnp.asarray([64.0, 64, 0, 0, 64, 64])
        added = AddedConditioning(x["text_embeds"], ids)
    return module(x["x"], jnp.float32(500), x["context"], added)


def run(module, model: str):
    x = {name: jnp.asarray(array) for name, array in denoiser_inputs(model).items()}
    return call(module, x)


def denoiser(model: str):
    modules = components(model)
    return modules["transformer" if model.startswith("flux") else "unet"]


@pytest.mark.parametrize("model", ["flux-dev", "sdxl"])
def test_without_adapters_the_models_agree(model):
    assert relative_error(run(denoiser(model), model), read_reference()[f"{model} plain"]) < 5e-6


@pytest.mark.parametrize("case", AGREED)
def test_with_the_adapter_too(case):
    draft, reference = agreed(case), read_reference()
    model = draft.model
    module = denoiser(model)
    fitted = lora.fit(components(model), draft.adapter())
    name = "transformer" if model.startswith("flux") else "unet"
    wanted = reference[case]
    assert relative_error(wanted, reference[f"{model} plain"]) > 0.01
    merged = lora.merge_fitted({name: module}, fitted)[name]
    assert relative_error(run(merged, model), wanted) < 5e-6
    if case in ("kohya-sdxl", "peft-dora"):
        applied = lora.apply_fitted({name: module}, fitted)[name]
        assert relative_error(run(applied, model), wanted) < 5e-6


# --- six places where diffusers 0.42.1 is wrong ---


def check(draft: Draft) -> None:
    adapter = draft.adapter()
    modules = components(draft.model)
    check_changes(draft, lora.merge(modules, adapter))
    check_changes(draft, realized(lora.apply(modules, adapter)))


@pytest.mark.parametrize("model", ["sdxl", "flux-dev"])
def test_kohyas_dora_is_no_plain_lora(model):
    """Diffusers drops `dora_scale` with a warning."""
    draft = Draft(model)
    layouts = {"sdxl": SGM, "flux-dev": BFL}
    for name, targets in list(layouts[model].items())[:3]:
        dora("columns")(draft, f"lora_unet_{name.replace('.', '_')}", targets)
    check(draft)


def test_loha_of_sdxl_and_lokr_of_flux_are_read():
    """Diffusers raises `ValueError` for both."""
    for model, make, layout in (("sdxl", loha, SGM), ("flux-dev", lokr(False, True), BFL)):
        draft = Draft(model)
        for name, targets in list(layout.items())[:2]:
            make(draft, f"lora_unet_{name.replace('.', '_')}", targets)
        check(draft)


def test_peft_names_of_the_original_flux_are_read():
    """Diffusers finds none of them, and says so in a warning only."""
    draft = Draft("flux-dev")
    FORMATS["ai-toolkit"][2](draft)
    check(draft)


def test_onetrainers_mlps_and_modulations_are_apart():
    """Diffusers gives all of them one name, so that all but one are lost."""
    draft = Draft("flux-dev")
    for target in FLUX[1:3]:
        draft.lora(f"lora_transformer_{flat(target)}", target, alpha=1)
    check(draft)


def test_the_last_layer_of_kohyas_flux_keeps_its_alpha():
    """Diffusers ignores it, and the layer."""
    draft = Draft("flux-dev")
    draft.lora("lora_unet_final_layer_linear", BFL["final_layer.linear"], alpha=1, rank=4)
    swapped_halves(draft, "lora_unet_final_layer_adaLN_modulation_1", "kohya", alpha=1)
    check(draft)


def test_text_encoders_biases_norms_and_embeddings_are_changed():
    """Diffusers drops T5, `diff_b`, norms, the projection and positions without a word."""
    draft = Draft("flux-dev")
    for target in T5_NAMES:
        draft.lora(f"lora_te2_{flat(target)}", target, alpha=1)
    stem, target = "lora_unet_double_blocks_1_img_attn_proj", BFL["double_blocks.1.img_attn.proj"]
    draft.file[f"{stem}.diff"] = noise("diff", *draft.shape(target))
    draft.file[f"{stem}.diff_b"] = noise("diff_b", draft.shape(target)[0])
    draft.expect(target, noise("diff", *draft.shape(target)))
    draft.expect(target, noise("diff_b", draft.shape(target)[0]), "bias")
    norm = "transformer:transformer_blocks.1.attn.norm_k"
    draft.file["lora_unet_double_blocks_1_img_attn_norm_key_norm.diff"] = noise("norm", 16)
    draft.expect(norm, noise("norm", 16))
    check(draft)
    draft = Draft("sdxl")
    draft.lora("lora_te2_text_projection", "text_encoder_2:text_projection", alpha=1)
    for component, prefix in (("text_encoder", "te1"), ("text_encoder_2", "te2")):
        target = f"{component}:text_model.embeddings.position_embedding"
        change = noise(component, *draft.shape(target))
        draft.file[f"lora_{prefix}_{flat(target)}.diff"] = change
        draft.expect(target, change)
        norm = f"{component}:text_model.final_layer_norm"
        draft.file[f"lora_{prefix}_{flat(norm)}.w_norm"] = noise(prefix, *draft.shape(norm))
        draft.expect(norm, noise(prefix, *draft.shape(norm)))
    check(draft)
