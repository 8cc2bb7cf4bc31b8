"""From any published layout to another: recognise, recast, write, inspect."""

from .open import Checkpoint as Checkpoint, open_checkpoint as open_checkpoint
from .recognise import (
    claim as claim,
    describe as describe,
    find_pieces as find_pieces,
    locate as locate,
)
from .write import (
    plan_file as plan_file,
    plan_folder as plan_folder,
    write_file as write_file,
    write_folder as write_folder,
)
