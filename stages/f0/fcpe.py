"""FCPE (`models.f0.fcpe`) with the weights of the package torchfcpe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.f0.networks import at_16k, every_10_ms, network
from stages.frames import Track
from stages.types import Array

if TYPE_CHECKING:
    from models.f0.fcpe import Fcpe

# On vocadito this marks 98.7 % of the voiced and 6 % of the unvoiced frames as voiced; torchfcpe's
# own 0.006 marks 99.9 % and 24 %. Low thresholds are far worse in noise; from 0.5 on, rough voices
# are lost.
_DEFAULT_VOICING = 0.3


def fcpe(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterable[Track]:
    """Estimate f0 of each clip: Hz and sample positions.

    Each clip is normalised to a peak of 1: the network's input spectra have a floor, and with a
    peak of -60 dBFS it loses half of vocadito's voiced frames. The window of frame j is centred on
    sample 160 j + 80, but the network was trained to give the pitch at sample 160 j, and does so to
    within half a millisecond.
    """
    loud = (wav / np.abs(wav).max() for wav in wavs)
    return every_10_ms(fcpe_frames(loud, sample_rate, cfg, _DEFAULT_VOICING), sample_rate)


def fcpe_frames(
    wavs: Iterable[Array], sample_rate: int, cfg: F0Config, default_voicing: float
) -> list[NDArray[np.float64]]:
    """Estimate f0 in Hz every 10 ms, 0 = unvoiced, of each clip at its own level."""
    import torch

    fcpe: Fcpe = network("fcpe", cfg)
    threshold = default_voicing if cfg.voicing_threshold is None else cfg.voicing_threshold
    wavs_16k = at_16k(wavs, sample_rate)
    pitches = fcpe.pitch([torch.from_numpy(np.require(wav, requirements="W")) for wav in wavs_16k])
    return [
        np.where(strength.numpy() > threshold, f0.double().numpy(), 0.0) for f0, strength in pitches
    ]
