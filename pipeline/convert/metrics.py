"""How well a converted song follows the melody that was asked for, and whose timbre it has."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from models.synthesizer.config import MelConfig
from models.synthesizer.mel import mel_of, spectrogram
from stages.f0 import F0Config, estimate_f0
from stages.f0.pitch import f0_to_pitch
from stages.frames import num_frames
from stages.types import Array, Samples

_BLOCK_S = 30.0  # of a song that is looked at together
_MARGIN_S = 0.5  # around it, so that its ends are heard as in the song

_ENVELOPE_HOP = 512
_ENVELOPE_MEL = MelConfig(f_max=8000.0)
_DB_PER_NEPER = 20 / math.log(10)


def follow_f0(asked: Array, found: Array, cents: float = 50.0) -> dict[str, float]:
    """Two contours (F,) in Hz, 0 where unvoiced.

    near: share within `cents` of the frames that are voiced in both.
    median_cents: median distance over those frames.
    voicing_agreement: share of all frames that are voiced in both or in neither.
    Each is NaN where there is no such frame.
    """
    apart = 100 * np.abs(f0_to_pitch(found) - f0_to_pitch(asked))  # NaN where one is unvoiced
    off = apart[np.isfinite(apart)]
    same = (asked > 0) == (found > 0)
    return {
        "near": float(np.mean(off <= cents)) if len(off) else math.nan,
        "median_cents": float(np.median(off)) if len(off) else math.nan,
        "voicing_agreement": float(np.mean(same)) if len(same) else math.nan,
    }


def measure_f0(
    wav: Samples, sample_rate: int, hop_length: int, n_frames: int, highest_hz: float = 0.0
) -> Array:
    """(F,) Hz of wav (T,) by Praat, 0 where unvoiced; block by block, however long the song is.

    highest_hz: the range that is searched, up to 1100 Hz at least, reaches a little above it.
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
        found = estimate_f0(piece, sample_rate, cfg, n_frames=last - begin)
        f0[first:last] = found[first - begin :]
    return f0


def long_term_envelope(wav: Samples, sample_rate: int) -> NDArray[np.float64]:
    """Mean log mel (80,) in dB over the voiced frames of wav (T,), less its own mean: what is left
    is the colour of the voice, and of its words and notes where it sings few.

    Bands reach up to 8 kHz. Compare wavs of one sample rate. NaN where nothing is voiced.
    Raises: ValueError for a sample rate below 16000 Hz.
    """
    if sample_rate < 2 * 8000:
        raise ValueError(
            f"a long-term envelope reaches up to 8000 Hz and needs a sample rate of 16000 Hz or "
            f"more, not {sample_rate}"
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
    """Root mean square over the bands of two `long_term_envelope`s, in dB."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _log_mel(wav: Array, sample_rate: int) -> NDArray[np.float64]:
    """(80, T // hop) dB. A block's end that is too short for a spectrogram goes on as silence."""
    short = max(0, _ENVELOPE_MEL.n_fft - len(wav))
    spec = spectrogram(
        torch.from_numpy(np.pad(wav, (0, short)))[None], _ENVELOPE_MEL, _ENVELOPE_HOP
    )
    mel = mel_of(spec, _ENVELOPE_MEL, sample_rate)[0].numpy()
    return np.asarray(mel[:, : len(wav) // _ENVELOPE_HOP] * _DB_PER_NEPER, dtype=np.float64)
