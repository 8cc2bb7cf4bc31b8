"""Solvers of the sampling equations, one small file each."""

from ._base import AbstractSolver as AbstractSolver
from .ddim import DDIM as DDIM, StochasticDDIM as StochasticDDIM
from .ddpm import DDPM as DDPM
from .dpmpp_2m import DPMpp2M as DPMpp2M
from .dpmpp_2m_sde import DPMpp2MSDE as DPMpp2MSDE
from .dpmpp_sde import DPMppSDE as DPMppSDE
from .euler import Euler as Euler
from .euler_ancestral import EulerAncestral as EulerAncestral
from .heun import Heun as Heun
from .lcm import LCM as LCM
from .lms import LMS as LMS
from .pndm import PNDM as PNDM
from .tcd import TCD as TCD
from .unipc import UniPC as UniPC
