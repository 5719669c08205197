"""f0: the pitch of a clip, one value a hop. A method is a function in `METHODS`."""

from stages.f0.config import F0Config
from stages.f0.estimate import (
    METHODS,
    check_networks,
    estimate_clips,
    estimate_f0,
    load_networks,
)

__all__ = [
    "METHODS",
    "F0Config",
    "check_networks",
    "estimate_clips",
    "estimate_f0",
    "load_networks",
]
