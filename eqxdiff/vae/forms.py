"""How published files name the tensors of the autoencoder."""

from ..checkpoint.form import Form


AUTOENCODER = (
    Form("vae", ("decoder.up_blocks.0.resnets.0.conv1.weight",)),
    Form("vae_ldm", ("decoder.up.0.block.0.conv1.weight",)),
)
