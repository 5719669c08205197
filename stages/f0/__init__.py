"""f0: the pitch of a clip, one value per hop. `METHODS` lists the methods."""

from stages.f0.config import METHODS, F0Config
from stages.f0.estimate import (
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
