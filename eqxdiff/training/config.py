"""The TOML file of `eqxdiff train` as frozen dataclasses."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from .._config import coerce, spell_type
from .._errors import ConfigError
from ..kernels import Attention


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model to train, and which of its parameters.

    - `name`: a model of the same family, such as `"flux-schnell"`.
    - `folder`: the folder of the configs and tokenizers, in the published layout. Its weights are
        not read.
    - `train`: regular expressions of the paths of the trained parameters, such as `"transformer"`
        or `"vae.decoder"`. An expression that begins with `vae` trains the autoencoder alone.
    - `weights`: component -> the folder of its config and weights. The others begin at random.
    - `zero`: regular expressions of the parameters that begin at zero, such as the gates
        (https://arxiv.org/abs/2212.09748, section 3.2).
    - `remat`: recompute each block in the backward pass, to save memory.
    - `compute_dtype`: the dtype of the activations; the weights are trained in float32.
    - `save_dtype`: the dtype of the weights of the finished model.
    - `attention`, `attention_blocks`: the backend of attention and its blocks, as of `load`.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    weights: tuple[tuple[str, str], ...] = ()
    zero: tuple[str, ...] = ()
    remat: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Attention = "auto"
    attention_blocks: tuple[int, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether the autoencoder is trained, alone."""
        return any(pattern.startswith("vae") for pattern in self.train)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images and captions to train on.

    - `folder`: a folder of images with captions, as `read_folder` reads it.
    - `height`, `width`: the size that all images are brought to, in pixels.
    - `caption_dropout`: the share of captions that are replaced by the empty text, from 0 to 1, for
        classifier-free guidance.
    - `max_sequence_length`: the number of tokens of a caption that the second text encoder sees.
    """

    folder: str
    height: int
    width: int
    caption_dropout: float = 0.1
    max_sequence_length: int = 77


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer: AdamW or Muon.

    - `name`: Muon (https://arxiv.org/abs/2502.16982) trains matrices and kernels, with updates of
        the size of AdamW's, and AdamW the rest.
    - `adam`: regular expressions of matrices that AdamW trains all the same, such as embeddings.
    - `learning_rate`: the learning rate between warm-up and cool-down.
    - `warmup`: the number of first steps, over which the learning rate rises linearly.
    - `cooldown`: the number of last steps, over which the learning rate falls linearly to 0.
    - `beta1`, `beta2`, `weight_decay`: as of AdamW.
    - `clip`: the largest norm of the gradients; larger gradients are scaled down to it.
    - `ema_decay`: the decay of the running average of the weights; 0 keeps no average.
    """

    name: Literal["adamw", "muon"] = "adamw"
    adam: tuple[str, ...] = ()
    learning_rate: float = 1e-4
    warmup: int = 100
    cooldown: int = 0
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.999


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss.

    - `levels`: the distribution of the noise levels of a rectified flow: `"logit-normal"`, with the
        `mean` and `std` of the logit, or `"uniform"`.
    - `shift`: the shift of these noise levels.
    - `min_snr_gamma`: the constant of `min_snr_weight`; 0 weighs all levels alike.
    - `kl_weight`, `edge_weight`: the weights of `autoencoder_loss`.
    """

    levels: Literal["logit-normal", "uniform"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    min_snr_gamma: float = 0.0
    kl_weight: float = 1e-4
    edge_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The length of the run, and how often it logs, draws and saves.

    - `steps`: the number of steps.
    - `batch_size`: the number of examples in a step.
    - `accumulate`: the number of parts that a batch is cut into, one in memory at a time.
    - `seed`: the seed of all random numbers.
    - `log_every`, `save_every`: the number of steps between two lines of the log, and between two
        saved states.
    - `sample_every`: the number of steps between two sheets of sample pictures; 0 draws none.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    sample_every: int = 1000
    save_every: int = 500


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The sample pictures.

    - `prompts`: a denoiser draws one picture of each.
    - `steps`, `cfg`, `seed`: the settings of these pictures.
    - `count`: an autoencoder reconstructs so many images, spread over the whole folder.
    """

    prompts: tuple[str, ...] = ()
    steps: int = 20
    cfg: float = 1.0
    seed: int = 0
    count: int = 16


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The whole config: a section of the TOML file for each field."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self):
        at_least = {
            ("run", "steps"): 1,
            ("run", "batch_size"): 1,
            ("run", "accumulate"): 1,
            ("run", "log_every"): 1,
            ("run", "save_every"): 1,
            ("run", "sample_every"): 0,
            ("run", "seed"): 0,
            ("data", "height"): 1,
            ("data", "width"): 1,
            ("optimizer", "warmup"): 0,
            ("optimizer", "cooldown"): 0,
            ("sample", "steps"): 1,
            ("sample", "seed"): 0,
            ("sample", "count"): 1,
        }
        for (section, name), least in at_least.items():
            if getattr(getattr(self, section), name) < least:
                raise ValueError(f"{section}.{name}: below {least}")
        if self.run.batch_size % self.run.accumulate:
            raise ValueError("run.batch_size: no multiple of run.accumulate")
        if not self.model.train:
            raise ValueError("model.train: an empty list")
        if not 0 <= self.data.caption_dropout <= 1:
            raise ValueError("data.caption_dropout: not between 0 and 1")
        if not 0 <= self.optimizer.ema_decay < 1:
            raise ValueError("optimizer.ema_decay: not between 0 and 1")

    @property
    def decisive(self) -> dict[str, Any]:
        """The fields that decide the numbers of a run, as JSON. Only a run with equal ones can be
        resumed."""
        fields = dataclasses.asdict(self)
        for section, names in (
            ("run", ("steps", "log_every", "sample_every", "save_every")),
            ("model", ("save_dtype", "attention", "attention_blocks")),
        ):
            for name in names:
                del fields[section][name]
        del fields["sample"]
        return fields


def read_config(path: str | Path) -> TrainConfig:
    """Reads a TOML file with the sections `[model]`, `[data]`, `[run]`, `[optimizer]`, `[loss]` and
    `[sample]`. Its paths are relative to the working directory.

    **Raises:** `ConfigError`, one message that lists every problem.
    """
    try:
        with open(path, "rb") as file:
            fields = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    problems: list[str] = []
    config = _parse(TrainConfig, fields, "", problems)
    if problems or config is None:
        raise ConfigError("\n  ".join([f"{path} is no valid training config:", *problems]))
    return config


def _parse(cls: type[T], fields: Mapping[str, Any], prefix: str, problems: list[str]) -> T | None:
    """Reads the fields of a section, and adds to `problems` what is wrong with them."""
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore
    problems += [f"{prefix}{name}: unknown" for name in fields if name not in known]
    before, values = len(problems), {}
    for name, field in known.items():
        hint = hints[name]
        if name not in fields:
            if field.default is dataclasses.MISSING:
                problems.append(f"{prefix}{name}: missing")
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            section = fields[name] if isinstance(fields[name], dict) else {"": fields[name]}
            values[name] = _parse(hint, section, f"{prefix}{name}.", problems)
        else:
            try:
                values[name] = _value(fields[name], hint)
            except (TypeError, ValueError):
                wanted = (
                    " or ".join(map(repr, typing.get_args(hint)))
                    if typing.get_origin(hint) is Literal
                    else spell_type(hint)
                )
                problems.append(f"{prefix}{name}: {fields[name]!r} is not {wanted}")
    if len(problems) > before or (not prefix and problems):
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(str(error))
        return None


def _value(value: Any, hint: Any) -> Any:
    """Converts a value of the TOML file. **Raises:** `TypeError`, `ValueError`."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if isinstance(value, dict):  # a table of paths
        value = tuple(sorted(value.items()))
    return coerce(tuple(value) if isinstance(value, list) else value, hint)
