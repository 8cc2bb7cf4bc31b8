"""What `eqxdiff train` is told: a TOML file as frozen dataclasses."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from .._config import coerce, spell_type
from .._errors import ConfigError


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    - `name`: a model whose family it is of, such as `"flux-schnell"`.
    - `folder`: its configs and tokenizers, in the published layout. Weights are not needed.
    - `train`: regular expressions of the paths of the trained parameters, such as `"transformer"`
        or `"vae.decoder"`. Where one is of the autoencoder, it is that alone that is trained.
    - `weights`: folders of components that do not begin at random, configs included.
    - `zero`: regular expressions of the parameters that begin at zero, such as those of the gates
        (https://arxiv.org/abs/2212.09748, section 3.2).
    - `remat`: recompute each block in the backward pass, to save memory.
    - `compute_dtype`: of the activations; the weights are trained in float32.
    - `save_dtype`: of the weights of the finished model.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    weights: tuple[tuple[str, str], ...] = ()
    zero: tuple[str, ...] = ()
    remat: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What it is trained on.

    - `folder`: of images with captions, as `read_folder` takes it.
    - `height`, `width`: of the images, in pixels.
    - `caption_dropout`: how many captions are left empty, for classifier-free guidance.
    """

    folder: str
    height: int
    width: int
    caption_dropout: float = 0.1
    max_sequence_length: int = 77


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, warmed up, constant, and linearly down to nothing at the end.

    - `name`: Muon (https://arxiv.org/abs/2502.16982) trains matrices and kernels, with updates of
        the size of AdamW's, and AdamW the rest.
    - `adam`: regular expressions of the matrices that AdamW trains all the same: embeddings.
    - `warmup`, `cooldown`: the steps of each.
    - `clip`: the largest norm of the gradients.
    - `ema_decay`: of the running average of the weights; 0 is none.
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
    """What is made small.

    - `levels`: of a rectified flow: `"logit-normal"`, of `mean` and `std`, or `"uniform"`.
    - `shift`: of those levels.
    - `min_snr_gamma`: weighs the levels by `min_snr_weight`; 0 weighs all the same.
    - `kl_weight`, `edge_weight`: of the autoencoder's loss.
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
    """For how long, and what is told meanwhile.

    - `steps`, `batch_size`, `seed`.
    - `accumulate`: how many parts a batch is cut into, one in memory at a time.
    - `log_every`, `sample_every`, `save_every`: in steps; `sample_every` 0 is never.
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
    """The sample pictures: one of each prompt. Of an autoencoder, the first `count` images."""

    prompts: tuple[str, ...] = ()
    steps: int = 20
    cfg: float = 1.0
    seed: int = 0
    count: int = 16


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All of it."""

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
        """What the numbers of a run hang on, as JSON: a run goes on only with the same."""
        fields = dataclasses.asdict(self)
        for section, names in (
            ("run", ("steps", "log_every", "sample_every", "save_every")),
            ("model", ("save_dtype",)),
        ):
            for name in names:
                del fields[section][name]
        del fields["sample"]
        return fields


def read_config(path: str | Path) -> TrainConfig:
    """Reads a TOML file of the sections `[model]`, `[data]`, `[run]`, `[optimizer]`, `[loss]` and
    `[sample]`. Paths in it are relative to the working directory.

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
        raise ConfigError("\n  ".join([f"{path} does not say how to train:", *problems]))
    return config


def _parse(cls: type[T], fields: Mapping[str, Any], prefix: str, problems: list[str]) -> T | None:
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
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if isinstance(value, dict):  # a table of paths
        value = tuple(sorted(value.items()))
    return coerce(tuple(value) if isinstance(value, list) else value, hint)
