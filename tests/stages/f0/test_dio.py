"""DIO against WORLD's in pyworld."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.f0.dio import dio_track

TOLERANCE_CENTS = 0.01


def assert_worlds(
    wav: NDArray[np.float64],
    sample_rate: int,
    f0_min: float = 50,
    f0_max: float = 1100,
    hop: int = 512,
) -> int:
    """Voiced frames, once they are WORLD's."""
    import pyworld

    theirs, their_times = pyworld.dio(
        wav, sample_rate, f0_floor=f0_min, f0_ceil=f0_max, frame_period=1000 * hop / sample_rate
    )
    ours, times = dio_track(wav, sample_rate, f0_min, f0_max, hop)
    np.testing.assert_array_equal(times, their_times)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    voiced = ours > 0
    assert (np.abs(1200 * np.log2(ours[voiced] / theirs[voiced])) <= TOLERANCE_CENTS).all()
    return int(voiced.sum())


RECORDINGS = [
    "198-209-0000.ogg",
    "carnatic.flac",
    "karissa_hobbs.ogg",
    "singing-female.flac",
    "soprano-E4.flac",
    "speech-female.flac",
    "speech-male.flac",
    "vignesh.flac",
    "vocadito_1.flac",
]


@pytest.mark.parametrize("name", RECORDINGS)
def test_real_voices(name: str, real_audio: Path) -> None:
    wav, sample_rate = soundfile.read(real_audio / name, always_2d=True, frames=10 * 44100)
    assert assert_worlds(wav.mean(axis=1), sample_rate) > 30


@pytest.mark.parametrize(
    "f0_min, f0_max, hop", [(20, 2000, 100), (65.4, 300, 882), (110, 600, 441), (200, 400, 240)]
)
def test_other_ranges_and_hops(f0_min: float, f0_max: float, hop: int, real_audio: Path) -> None:
    wav, sample_rate = soundfile.read(real_audio / "vocadito_1.flac", frames=10 * 44100)
    assert assert_worlds(wav, sample_rate, f0_min, f0_max, hop) > 20


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 40000),
    hop=st.integers(40, 1024),
    sample_rate=st.sampled_from([8000, 16000, 22050, 44100, 48000]),
    f0_min=st.sampled_from([20.0, 50.0, 65.4]),
    kind=st.sampled_from(["white", "brown", "square", "constant", "click", "click in silence"]),
    seed=st.integers(0, 999),
)
def test_any_signal(
    num_samples: int, hop: int, sample_rate: int, f0_min: float, kind: str, seed: int
) -> None:
    """Constant signals and clicks are silence to the filters, so nothing may be voiced."""
    rng = np.random.default_rng(seed)
    wav = rng.normal(size=num_samples)
    if kind == "brown":
        wav = np.cumsum(wav)
    elif kind == "square":
        wav = np.sign(np.sin(np.arange(num_samples) * 2 * np.pi * 217.3 / sample_rate + 0.1))
    elif kind != "white":
        level = 0.0 if kind == "click in silence" else 0.3
        click = num_samples // 2
        wav = np.where(np.arange(num_samples) == click, float(kind != "constant"), level)
    assert_worlds(wav, sample_rate, f0_min, 1100, hop)


def test_digital_silence_in_singing_is_unvoiced(real_audio: Path) -> None:
    wav, sample_rate = soundfile.read(real_audio / "vocadito_1.flac", frames=10 * 44100)
    wav[3 * 44100 : 5 * 44100] = 0
    wav[-44100:] = wav[-44101]
    f0, times = dio_track(wav, sample_rate, 50, 1100, 256)
    for first_s, last_s in [(3.05, 4.95), (9.05, 10)]:
        assert not f0[(times > first_s) & (times < last_s)].any()
    assert (f0[times < 3] > 0).mean() > 0.3


def test_blocks_leave_no_trace() -> None:
    """A tone's contour is flat where the blocks of the filters meet too."""
    sample_rate = 44100
    wav = np.sin(2 * np.pi * 440.5 * np.arange(4 * sample_rate) / sample_rate)
    f0, _ = dio_track(wav, sample_rate, 50, 1100, 64)
    inner = f0[200:-200]
    assert np.abs(1200 * np.log2(inner / 440.5)).max() < 0.1
    assert np.ptp(inner) < 1e-2
