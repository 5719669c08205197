"""Pictures of mel spectrograms: 160 bands of the HTK scale from 50 Hz to 8 kHz.

tests/pipeline/reports/test_dataset_page.py looks at them.

Tested by tests/pipeline/reports/test_dataset_page.py, tests/pipeline/convert/test_page.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

TOP_DB = 80.0  # range below the loudest point; softer points look like silence

_N_FFT, _N_MELS = 2048, 160
_F_MIN, _F_MAX = 50.0, 8000.0
_TICKS_HZ = (200, 400, 800, 1600, 3200, 6400)


def mel_power(wav: Array, sample_rate: int, hop_length: int) -> Array:
    """Return the power (M, F) of wav (T,); frame i is centred on sample i * hop_length."""
    import librosa

    with np.errstate(divide="ignore"):
        power: Array = librosa.feature.melspectrogram(
            y=wav, sr=sample_rate, n_fft=_N_FFT, hop_length=hop_length, n_mels=_N_MELS,
            fmin=_F_MIN, fmax=_highest_hz(sample_rate), htk=True,
        )  # fmt: skip
    return power


def power_db(power: Array, reference: float) -> Array:
    """Return decibels relative to `reference`, at least -`TOP_DB`."""
    floor = reference * 10 ** (-TOP_DB / 10)
    if floor <= 0:  # digital silence
        return np.full_like(power, -TOP_DB)
    return np.asarray(10 * np.log10(np.maximum(power, floor) / reference), dtype=np.float32)


def draw_mel(
    axes: Axes, mel_db: Array, sample_rate: int, frame_s: float, first_s: float = 0.0
) -> AxesImage:
    """Draw mel_db (M, F) over seconds and Hz; frame i is centred on first_s + i * frame_s."""
    low, high = mel_height(np.array([_F_MIN, _highest_hz(sample_rate)]))
    start = first_s - frame_s / 2
    image = axes.imshow(
        mel_db, origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
        vmin=-TOP_DB, vmax=0.0, extent=(start, start + mel_db.shape[1] * frame_s, low, high),
    )  # fmt: skip
    ticks = np.array([hz for hz in _TICKS_HZ if hz < _highest_hz(sample_rate)])
    axes.set_ylim(low, high)
    axes.set_yticks(mel_height(ticks), [str(hz) for hz in ticks])
    axes.set_ylabel("Hz, mel scale")
    axes.spines[:].set_visible(False)
    return image


def mel_height(hz: NDArray[Any]) -> NDArray[np.float64]:
    """Return the height of frequencies in the picture, in mel of HTK."""
    return np.asarray(2595 * np.log10(1 + hz / 700), dtype=np.float64)


def _highest_hz(sample_rate: int) -> float:
    return min(_F_MAX, sample_rate / 2)
