"""The log-mel spectrogram of FCPE and RMVPE: 128 bins every 10 ms of 16 kHz audio."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLE_RATE = 16000
HOP_LENGTH = 160
N_FFT = 1024
NUM_MELS = 128
_MIN_MEL = 1e-5  # lower limit before the logarithm
_BLOCK_FRAMES = 4096  # bounds the memory of the spectra


def f0_log_mel(padded: Tensor, filters: Tensor, floor: float = 0.0) -> Tensor:
    """Compute the natural log of mel-weighted magnitudes: (..., T) -> (..., F, M).

    padded: the clip with the network's padding; frame j is its Hann-weighted samples
    [160 j, 160 j + 1024), F = (T - 1024) // 160 + 1. filters: (M, 513). floor: added to the squared
    magnitudes.
    """
    window = torch.hann_window(N_FFT, device=padded.device)
    frames = padded.unfold(-1, N_FFT, HOP_LENGTH)  # (..., F, 1024), a view
    mel = padded.new_empty(*frames.shape[:-1], len(filters))
    for start in range(0, frames.shape[-2], _BLOCK_FRAMES):
        block = slice(start, start + _BLOCK_FRAMES)
        spectrum = torch.fft.rfft(frames[..., block, :] * window)
        magnitude = (spectrum.real.square() + spectrum.imag.square() + floor).sqrt()
        mel[..., block, :] = (magnitude @ filters.T).clamp(min=_MIN_MEL).log()
    return mel


def f0_mel_filters(scale: Literal["slaney", "htk"], f_min: float, f_max: float) -> Tensor:
    """Build triangles of equal area, evenly spaced in mel: float32 (M, 513); equal to librosa's.

    The scales are those of M. Slaney's Auditory Toolbox (linear below 1 kHz) and of the HTK book.
    """
    to_mel, to_hz = _SCALES[scale]
    edges = to_hz(np.linspace(*to_mel(np.array([f_min, f_max])), NUM_MELS + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clip(min=0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()


def _hz_to_slaney(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    above = 15 + np.log(np.maximum(hz, 1000) / 1000) * 27 / np.log(6.4)
    return np.where(hz < 1000, hz * 3 / 200, above)


def _slaney_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def _hz_to_htk(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2595 * np.log10(1 + hz / 700)


def _htk_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return 700 * (10 ** (mel / 2595) - 1)


_SCALES = {"slaney": (_hz_to_slaney, _slaney_to_hz), "htk": (_hz_to_htk, _htk_to_hz)}
