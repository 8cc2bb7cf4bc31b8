"""Sampling: schedules are data, a model is a callable, and a solver takes one step.

Nothing here knows a model.
"""

from .ahead import AbstractNetwork as AbstractNetwork, RowTable as RowTable
from .denoiser import (
    AbstractDenoiser as AbstractDenoiser,
    Denoiser as Denoiser,
    GuidedDenoiser as GuidedDenoiser,
)
from .discrete import (
    Grid as Grid,
    alphas_cumprod as alphas_cumprod,
    discrete_schedule as discrete_schedule,
    noise_levels as noise_levels,
)
from .discrete_config import (
    DiscreteSchedulerConfig as DiscreteSchedulerConfig,
    parse_discrete_config as parse_discrete_config,
)
from .flow import (
    FlowSchedulerConfig as FlowSchedulerConfig,
    dynamic_shift as dynamic_shift,
    flow_schedule as flow_schedule,
    flow_sigmas as flow_sigmas,
    parse_flow_config as parse_flow_config,
)
from .guidance import (
    AbstractGuider as AbstractGuider,
    ClassifierFree as ClassifierFree,
    Conditioned as Conditioned,
    Guided as Guided,
    Interval as Interval,
    Network as Network,
    Unguided as Unguided,
    classifier_free as classifier_free,
    condition_at as condition_at,
    predict_each as predict_each,
    stack_conditions as stack_conditions,
)
from .hooks import Blend as Blend, Hook as Hook, Moment as Moment
from .names import (
    SAMPLERS as SAMPLERS,
    Sampler as Sampler,
    default_sampler as default_sampler,
    find_sampler as find_sampler,
)
from .parameterization import (
    X0 as X0,
    AbstractParameterization as AbstractParameterization,
    Epsilon as Epsilon,
    Flow as Flow,
    VPrediction as VPrediction,
    parameterization_of as parameterization_of,
)
from .sample import (
    State as State,
    begin as begin,
    sample as sample,
    start as start,
    step as step,
)
from .schedule import Row as Row, Schedule as Schedule, add_noise as add_noise
from .solvers import (
    DDIM as DDIM,
    DDPM as DDPM,
    LCM as LCM,
    LMS as LMS,
    PNDM as PNDM,
    TCD as TCD,
    AbstractSolver as AbstractSolver,
    DPMpp2M as DPMpp2M,
    DPMpp2MSDE as DPMpp2MSDE,
    DPMppSDE as DPMppSDE,
    Euler as Euler,
    EulerAncestral as EulerAncestral,
    Heun as Heun,
    StochasticDDIM as StochasticDDIM,
    UniPC as UniPC,
)
from .spacing import AYS_TABLES as AYS_TABLES
