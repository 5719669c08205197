"""Encoders without weights: log mel energies and mel cepstra, as Kaldi defines them.

The conventions are those of Kaldi's `compute-fbank-feats` and `compute-mfcc-feats` without dither,
on samples in [-1, 1], as used for the first k-means targets of HuBERT (W.-N. Hsu et al., 2021,
section IV.A), but with one frame per 20 ms instead of two: the frame clock of HuBERT itself.

A frame is 25 ms: samples [320 i, 320 i + 400) at 16 kHz. A clip of T samples has
max(1, 1 + (T - 400) // 320) frames, as many as with the convolutions of wav2vec 2.0; a clip
shorter than a frame is padded with zeros.

Tested by tests/models/encoders/test_encoders.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.encoders.encoder import check_clips

SAMPLE_RATE = 16000
HOP_LENGTH = 320
FRAME_LENGTH = 400
_N_FFT = 512
_PRE_EMPHASIS = 0.97
_LOWEST_HZ = 20.0
_N_CEPSTRA = 13
_LIFTER = 22.0
_MELS_OF_CEPSTRA = 23


class MelSpectrum:
    """Log mel energies of one clip, used by both encoders."""

    def __init__(self, n_mels: int, device: str) -> None:
        self.device = torch.device(device)
        hann = torch.hann_window(FRAME_LENGTH, periodic=False, dtype=torch.float64)
        self.window = hann.pow(0.85).float().to(self.device)  # Kaldi's "povey" window
        self.filters = mel_filters(n_mels).to(self.device)

    def __call__(self, wav: Tensor) -> Tensor:
        """Compute (T,) -> (F, M), natural logarithm, at least log(2**-23)."""
        wav = wav.to(self.device)
        wav = F.pad(wav, (0, max(0, FRAME_LENGTH - len(wav))))
        frames = wav.unfold(0, FRAME_LENGTH, HOP_LENGTH)  # (F, 400)
        frames = frames - frames.mean(dim=1, keepdim=True)
        before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        frames = (frames - _PRE_EMPHASIS * before) * self.window
        spectrum = torch.view_as_real(torch.fft.rfft(frames, _N_FFT))  # (F, 257, 2)
        power = spectrum.square().sum(dim=2)
        return (power @ self.filters).clamp(min=torch.finfo(torch.float32).eps).log()


class LogMel:
    """Log mel energies from 20 Hz to 8 kHz: (T,) -> (F, n_mels). Frames: see the module."""

    name = "log-mel"
    sample_rate = SAMPLE_RATE
    hop_length = HOP_LENGTH

    def __init__(self, n_mels: int = 80, device: str = "cpu") -> None:
        self.dim = n_mels
        self.mel = MelSpectrum(n_mels, device)

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Encode as `Encoder.encode`, clip by clip, since a batch would not be faster."""
        return [self.mel(wav).cpu() for wav in check_clips(wavs)]


class Mfcc:
    """Mel cepstra with first and second differences: (T,) -> (F, 39). Frames: see the module.

    13 liftered cepstra, the zeroth included. Differences are slopes over five frames, with the ends
    repeated.
    """

    name = "mfcc"
    sample_rate = SAMPLE_RATE
    hop_length = HOP_LENGTH
    dim = 3 * _N_CEPSTRA

    def __init__(self, device: str = "cpu") -> None:
        self.mel = MelSpectrum(_MELS_OF_CEPSTRA, device)
        order = torch.arange(_N_CEPSTRA, dtype=torch.float64)
        lifter = 1 + _LIFTER / 2 * torch.sin(math.pi * order / _LIFTER)
        dct = cosine_transform(_MELS_OF_CEPSTRA, _N_CEPSTRA)
        self.cepstra = (dct * lifter).float().to(self.mel.device)  # (M, 13)

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Encode as `Encoder.encode`, clip by clip, since a batch would not be faster."""
        units = []
        for wav in check_clips(wavs):
            cepstra = self.mel(wav) @ self.cepstra
            slopes = delta_features(cepstra)
            units.append(torch.cat([cepstra, slopes, delta_features(slopes)], dim=1).cpu())
        return units


def mel_filters(n_mels: int) -> Tensor:
    """Build triangles linear in mel = 1127 ln(1 + f / 700): float32 (257, n_mels).

    Raises: ValueError: when `n_mels` is so high that a triangle lies between two FFT bins.
    """

    def mel(hz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hz / 700)

    ends = mel(torch.tensor([_LOWEST_HZ, SAMPLE_RATE / 2], dtype=torch.float64))
    edges = torch.linspace(float(ends[0]), float(ends[1]), n_mels + 2, dtype=torch.float64)
    bins = torch.arange(_N_FFT // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / _N_FFT
    at = mel(bins)[:, None]
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0)
    if not filters.sum(dim=0).all():
        raise ValueError(f"n_mels={n_mels} is too high for frames of 25 ms: some bands are empty")
    return filters.float()


def cosine_transform(n_in: int, n_out: int) -> Tensor:
    """Build the orthonormal DCT-II as a matrix: float64 (n_in, n_out)."""
    n = torch.arange(n_in, dtype=torch.float64)[:, None]
    k = torch.arange(n_out, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi / n_in * (n + 0.5) * k) * math.sqrt(2 / n_in)
    matrix[:, 0] = math.sqrt(1 / n_in)
    return matrix


def delta_features(x: Tensor) -> Tensor:
    """Compute the least-squares slope (F, D) over frames i - 2 to i + 2, with the ends repeated."""
    n_frames = len(x)
    x = torch.cat([x[:1], x[:1], x, x[-1:], x[-1:]])

    def shifted(by: int) -> Tensor:
        return x[2 + by : 2 + by + n_frames]

    return (2 * (shifted(2) - shifted(-2)) + shifted(1) - shifted(-1)) / 10
