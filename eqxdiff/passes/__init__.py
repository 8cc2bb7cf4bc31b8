"""Passes: functions from a loaded model to one that computes the same in less time or memory."""

from .conv import lay_convolutions as lay_convolutions
