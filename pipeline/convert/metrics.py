"""Metrics of a converted song: agreement with the target f0, and timbre."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.synthesizer.config import MelConfig
from models.synthesizer.mel import mel_of, spectrogram
from stages.f0 import F0Config, estimate_f0
from stages.f0.pitch import f0_to_pitch
from stages.frames import num_frames
from stages.types import Array, Samples

_BLOCK_S = 30.0  # length of a song that is analysed at once
_MARGIN_S = 0.5  # context on both sides of a block

_ENVELOPE_HOP = 512
_ENVELOPE_MEL = MelConfig(f_max=8000.0)
_DB_PER_NEPER = 20 / math.log(10)


@dataclass(frozen=True)
class F0Agreement:
    """Agreement of two f0 contours; each number is NaN where it has no frame to count.

    near: share of the frames voiced in both whose distance is within the limit.
    median_cents: median distance over those frames.
    voicing_agreement: share of all frames that are voiced in both or in neither.
    """

    near: float
    median_cents: float
    voicing_agreement: float


def compare_f0(target: Array, measured: Array, cents: float = 50.0) -> F0Agreement:
    """Compare two contours (F,) in Hz, 0 where unvoiced. cents: limit of `near`."""
    distance = 100 * np.abs(f0_to_pitch(measured) - f0_to_pitch(target))  # NaN where unvoiced
    distance = distance[np.isfinite(distance)]
    same = (target > 0) == (measured > 0)
    return F0Agreement(
        near=float(np.mean(distance <= cents)) if len(distance) else math.nan,
        median_cents=float(np.median(distance)) if len(distance) else math.nan,
        voicing_agreement=float(np.mean(same)) if len(same) else math.nan,
    )


def measure_f0(
    wav: Samples, sample_rate: int, hop_length: int, n_frames: int, highest_hz: float = 0.0
) -> Array:
    """Return f0 (F,) in Hz of wav (T,) by Praat, 0 where unvoiced, analysed in blocks.

    highest_hz: highest expected f0. The search range ends 20 % above it, at 1100 Hz or higher.
    """
    cfg = F0Config(
        method="praat",
        hop_length=hop_length,
        f0_max=min(max(1100.0, 1.2 * highest_hz), 0.45 * sample_rate),
    )
    block = round(_BLOCK_S * sample_rate / hop_length)
    margin = round(_MARGIN_S * sample_rate / hop_length)
    f0 = np.zeros(n_frames, dtype=np.float32)
    for first in range(0, n_frames, block):
        last = min(first + block, n_frames)
        begin = max(0, first - margin)
        piece = wav[begin * hop_length : (last + margin) * hop_length]
        f0[first:last] = estimate_f0(piece, sample_rate, cfg, n_frames=last - begin)[
            first - begin :
        ]
    return f0


def long_term_envelope(wav: Samples, sample_rate: int) -> NDArray[np.float64]:
    """Return the mean log mel (80,) in dB over the voiced frames of wav (T,), less its own mean.

    It describes the timbre of the voice; over few words and notes it depends on them too. Bands
    reach up to 8 kHz. Compare wavs of one sample rate. NaN where nothing is voiced.

    Raises: ValueError: when the sample rate is below 16000 Hz.
    """
    if sample_rate < 2 * 8000:
        raise ValueError(
            f"sample rate {sample_rate} Hz is too low for a long-term envelope up to 8000 Hz; "
            "use 16000 Hz or more"
        )
    n_frames = num_frames(len(wav), _ENVELOPE_HOP)
    voiced = measure_f0(wav, sample_rate, _ENVELOPE_HOP, n_frames) > 0
    total, count = np.zeros(_ENVELOPE_MEL.n_mels), 0
    block = round(_BLOCK_S * sample_rate / _ENVELOPE_HOP)
    for first in range(0, n_frames, block):
        inside = voiced[first : first + block]
        if not inside.any():
            continue
        piece = wav[first * _ENVELOPE_HOP : (first + len(inside)) * _ENVELOPE_HOP]
        total += _log_mel(piece, sample_rate)[:, inside].sum(axis=1)
        count += int(inside.sum())
    if count == 0:
        return np.full(_ENVELOPE_MEL.n_mels, np.nan)
    envelope = total / count
    return np.asarray(envelope - envelope.mean())


def envelope_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the root mean square difference of two `long_term_envelope`s over the bands, in dB."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _log_mel(wav: Array, sample_rate: int) -> NDArray[np.float64]:
    """Return (80, T // hop) in dB; a block too short for a spectrogram is padded with silence."""
    short = max(0, _ENVELOPE_MEL.n_fft - len(wav))
    spec = spectrogram(
        torch.from_numpy(np.pad(wav, (0, short)))[None], _ENVELOPE_MEL, _ENVELOPE_HOP
    )
    mel = mel_of(spec, _ENVELOPE_MEL, sample_rate)[0].numpy()
    return np.asarray(mel[:, : len(wav) // _ENVELOPE_HOP] * _DB_PER_NEPER, dtype=np.float64)
