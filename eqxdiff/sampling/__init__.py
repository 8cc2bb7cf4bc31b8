"""Schedules are data, a model is a callable, a solver takes one step; no model is known here."""

from .flow import (
    FlowSchedulerConfig as FlowSchedulerConfig,
    dynamic_shift as dynamic_shift,
    flow_schedule as flow_schedule,
    flow_sigmas as flow_sigmas,
    parse_flow_config as parse_flow_config,
)
from .guidance import (
    ClassifierFree as ClassifierFree,
    Conditioned as Conditioned,
    Denoiser as Denoiser,
    classifier_free as classifier_free,
    stack_conditioning as stack_conditioning,
)
from .parameterization import (
    X0 as X0,
    AbstractParameterization as AbstractParameterization,
    Epsilon as Epsilon,
    Flow as Flow,
    VPrediction as VPrediction,
)
from .sample import sample as sample, start as start, step as step
from .schedule import Row as Row, Schedule as Schedule, add_noise as add_noise
from .solvers import AbstractSolver as AbstractSolver, Euler as Euler, Heun as Heun
