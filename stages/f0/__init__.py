"""f0: the pitch of a clip, one value a hop. A method is a function in `METHODS`."""

from stages.f0.config import F0Config
from stages.f0.estimate import METHODS, estimate_clips, estimate_f0

__all__ = ["METHODS", "F0Config", "estimate_clips", "estimate_f0"]
