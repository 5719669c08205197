"""FCPE with the weights that the package torchfcpe brings (`models.f0.fcpe`)."""

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

# On vocadito's singing that voices 98.7 % of the frames that are voiced and 6 % of the others;
# torchfcpe's own 0.006 99.9 % and 24 %. In noise low thresholds do far worse; from 0.5 on rough
# voices get lost.
_DEFAULT_VOICING = 0.3


def fcpe(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterable[Track]:
    """f0 in Hz and the samples that its values belong to, of each clip.

    Each clip is brought to a peak of 1: the spectra that the network sees have a floor, and where
    the peak lies at -60 dBFS it loses half of vocadito's voiced frames. Frame j sees the samples
    around 160 j + 80, but the network was taught to give the pitch at sample 160 j, and does so to
    within half a millisecond.
    """
    loud = (wav / np.abs(wav).max() for wav in wavs)
    return every_10_ms(fcpe_frames(loud, sample_rate, cfg, _DEFAULT_VOICING), sample_rate)


def fcpe_frames(
    wavs: Iterable[Array], sample_rate: int, cfg: F0Config, default_voicing: float
) -> list[NDArray[np.float64]]:
    """f0 in Hz every 10 ms, 0 = unvoiced, of each clip at the level that it has."""
    import torch

    fcpe: Fcpe = network("fcpe", cfg)
    threshold = default_voicing if cfg.voicing_threshold is None else cfg.voicing_threshold
    heard = at_16k(wavs, sample_rate)
    found = fcpe.pitch([torch.from_numpy(np.require(wav, requirements="W")) for wav in heard])
    return [
        np.where(strength.numpy() > threshold, f0.double().numpy(), 0.0) for f0, strength in found
    ]
