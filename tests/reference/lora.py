"""Records what diffusers and PEFT compute with tiny LoRAs: python tests/reference/lora.py"""

import json

import numpy as np
import torch
from _torch import FIXTURES
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from lora_files import AGREED, DEEPER, Draft, agreed, base_tensors, denoiser_inputs

from eqxdiff.models import find_model


def denoiser(model: str) -> torch.nn.Module:
    """The tiny transformer or UNet of diffusers, with the weights that the tests have."""
    name = "transformer" if model.startswith("flux") else "unet"
    fields = json.loads(find_model(model)[0].example(model)[f"{name}/config.json"])
    if name == "unet":
        fields |= DEEPER
    cls = FluxTransformer2DModel if name == "transformer" else UNet2DConditionModel
    module = cls.from_config(fields)
    state = {
        key.removeprefix(f"{name}:"): torch.from_numpy(array)
        for key, array in base_tensors(model).items()
        if key.startswith(f"{name}:")
    }
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def load(module: torch.nn.Module, draft: Draft) -> None:
    """As the pipelines of diffusers load a file."""
    state = {name: torch.from_numpy(array.copy()) for name, array in draft.file.items()}
    fields = draft.metadata.get("lora_adapter_metadata")
    metadata = None if fields is None else json.loads(fields)
    if isinstance(module, FluxTransformer2DModel):
        state, alphas = FluxPipeline.lora_state_dict(state, return_alphas=True)
        FluxPipeline.load_lora_into_transformer(
            state, network_alphas=alphas, transformer=module, metadata=metadata
        )
    else:
        pipeline = StableDiffusionXLPipeline
        state, alphas = pipeline.lora_state_dict(state, unet_config=module.config)
        pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=module)


@torch.no_grad()
def run(module: torch.nn.Module, model: str) -> np.ndarray:
    x = {name: torch.from_numpy(array)[None] for name, array in denoiser_inputs(model).items()}
    if isinstance(module, FluxTransformer2DModel):
        ids = torch.arange(33.0).reshape(11, 3)
        out = module(
            hidden_states=x["img"],
            encoder_hidden_states=x["txt"],
            pooled_projections=x["pooled"],
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.5]),
            txt_ids=ids[:5],
            img_ids=ids[5:],
        )
        return out.sample[0].numpy()
    added = None
    if "text_embeds" in x:
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        added = {"text_embeds": x["text_embeds"], "time_ids": ids}
    sample = x["x"].permute(0, 3, 1, 2)
    out = module(sample, 500.0, x["context"], added_cond_kwargs=added)
    return out.sample[0].permute(1, 2, 0).numpy()


def main() -> None:
    logging.set_verbosity_error()
    record = {}
    for model in ("flux-dev", "sdxl"):
        record[f"{model} plain"] = run(denoiser(model), model)
    for case in AGREED:
        draft = agreed(case)
        module = denoiser(draft.model)
        load(module, draft)
        record[case] = run(module, draft.model)
    np.savez_compressed(FIXTURES / "lora.npz", **record)


if __name__ == "__main__":
    main()
