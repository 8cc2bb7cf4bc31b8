"""Training: losses, noise levels, one step, and a run from a folder of images to a model."""

from .config import TrainConfig as TrainConfig, read_config as read_config
from .data import CaptionedImage as CaptionedImage, read_folder as read_folder
from .levels import (
    AbstractLevels as AbstractLevels,
    Discrete as Discrete,
    LogitNormal as LogitNormal,
    Uniform as Uniform,
)
from .losses import (
    autoencoder_loss as autoencoder_loss,
    denoising_loss as denoising_loss,
    kl_divergence as kl_divergence,
    min_snr_weight as min_snr_weight,
    reconstruction_loss as reconstruction_loss,
)
from .objectives import (
    AutoencoderObjective as AutoencoderObjective,
    DenoiserObjective as DenoiserObjective,
)
from .run import train as train
from .saving import load_state as load_state, save_state as save_state, saved_states as saved_states
from .step import (
    Task as Task,
    TrainState as TrainState,
    gradients as gradients,
    select as select,
    train_step as train_step,
)
