"""Frames beyond a clip's end, and the memory layouts of clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.f0 import F0Config, estimate_f0
from stages.types import Array

RATE = 44100


def tone(num_samples: int, rate: int = RATE) -> Array:
    phase = 2 * np.pi * 220 / rate * np.arange(num_samples)
    wav = sum(np.sin(k * phase) / k for k in range(1, 6))
    return np.asarray(0.2 * wav, np.float32)


@pytest.mark.parametrize(
    "cfg, num_samples",
    [
        (F0Config(method="fcpe", hop_length=40), RATE // 2),  # 10 ms reach 5 ms beyond the clip
        (F0Config(method="crepe-tiny", crepe_hop_ms=200), 19000),
        (F0Config(method="praat", hop_length=64), RATE // 2),
    ],
)
def test_frames_beyond_the_clip_are_unvoiced(cfg: F0Config, num_samples: int) -> None:
    inside = -(-num_samples // cfg.hop_length)  # frame i is at sample i * hop_length
    f0 = estimate_f0(tone(num_samples), RATE, cfg, inside + 40)
    assert f0[inside // 2] > 0
    assert not f0[inside:].any()


@pytest.mark.parametrize("method", ["praat", "dio", "crepe-tiny", "fcpe", "rmvpe"])
@pytest.mark.parametrize("rate", [16000, RATE])  # networks resample one of them
def test_a_clip_may_be_float64_a_view_or_read_only(
    method: str, rate: int, tiny_rmvpe: Path
) -> None:
    checkpoint = str(tiny_rmvpe) if method == "rmvpe" else None
    cfg = F0Config(method=method, checkpoint=checkpoint)  # type: ignore[arg-type]
    wav = tone(rate // 4, rate)
    read_only = wav.copy()
    read_only.flags.writeable = False
    expected = estimate_f0(wav, rate, cfg)
    for same in (wav.astype(np.float64), np.stack([wav, wav], 1)[:, 1], wav[::-1].copy()[::-1]):
        np.testing.assert_array_equal(estimate_f0(same, rate, cfg), expected)
    np.testing.assert_array_equal(estimate_f0(read_only, rate, cfg), expected)


def test_a_rate_that_networks_cannot_resample_is_an_error_of_the_settings() -> None:
    """It is not a clip's error, which would quarantine the clip."""
    with pytest.raises(ValueError, match="cannot resample 44101 Hz to 16000 Hz"):
        estimate_f0(tone(4000), 44101, F0Config(method="fcpe"))
