"""What a picture needs, known before it is made."""

from .advise import advise as advise, auto_mesh as auto_mesh, gib as gib, require as require
from .ahead import (
    Wish as Wish,
    describe as describe,
    look_ahead as look_ahead,
    refuse_what_cannot_fit as refuse_what_cannot_fit,
)
from .artefact import Artefact as Artefact, compile_picture as compile_picture
from .count import Cost as Cost, count as count
from .estimate import (
    Choice as Choice,
    Forecast as Forecast,
    make_plan as make_plan,
    spell_mesh as spell_mesh,
)
from .shapes import Program as Program, Skeletons as Skeletons, make_programs as make_programs
from .targets import TARGETS as TARGETS, Target as Target, find_target as find_target
