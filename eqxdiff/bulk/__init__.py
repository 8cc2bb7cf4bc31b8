"""Pictures of more prompts than one machine has time for: lines in, files of stable names out."""

from .job import run as run
from .lines import (
    PromptLine as PromptLine,
    naming as naming,
    parse_line as parse_line,
    read_lines as read_lines,
)
from .names import picture_name as picture_name
