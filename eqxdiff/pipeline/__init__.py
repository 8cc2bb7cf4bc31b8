"""Prompt to picture: open, load, encode, sample, decode."""

from .batch import (
    Example as Example,
    Job as Job,
    cuts as cuts,
    initial_noise as initial_noise,
    make_jobs as make_jobs,
    stack_examples as stack_examples,
    to_bytes as to_bytes,
)
from .blueprint import Blueprint as Blueprint, Progress as Progress
from .generate import (
    Picture as Picture,
    Result as Result,
    generate as generate,
    generate_each as generate_each,
    prepare as prepare,
)
from .open import load as load, open_model as open_model
from .pipeline import Pipeline as Pipeline
from .programs import Programs as Programs
from .record import (
    chunks as chunks,
    parameters as parameters,
    png as png,
    run_record as run_record,
)
from .request import (
    ControlImage as ControlImage,
    Request as Request,
    check_noise as check_noise,
    expand as expand,
    share as share,
)
from .sample import (
    Step as Step,
    decode as decode,
    sample_latent as sample_latent,
    steps as steps,
)
from .stages import Stages as Stages
from .texts import (
    Cut as Cut,
    CutPromptWarning as CutPromptWarning,
    Encoded as Encoded,
)
