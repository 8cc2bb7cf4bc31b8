"""Solvers of the sampling equations, one small file each."""

from ._base import AbstractSolver as AbstractSolver
from .euler import Euler as Euler
from .heun import Heun as Heun
