"""Clips too long for one call of a library, which run in blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from stages.f0 import F0Config, pyin, world
from stages.f0.world import world_track


@pytest.mark.parametrize("sample_rate, hop_length, extra", [(44100, 512, 17), (22050, 300, 5)])
def test_harvest_in_blocks_is_harvest(
    sample_rate: int,
    hop_length: int,
    extra: int,
    real_audio: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wav, _ = soundfile.read(real_audio / "vocadito_1.flac", dtype="float32")
    wav = wav[44100 : 44100 + 7 * sample_rate + extra]  # at another rate another voice
    cfg = F0Config(method="harvest", hop_length=hop_length)
    whole, times = world_track("harvest", wav, sample_rate, cfg)
    monkeypatch.setattr(world, "_HARVEST_BLOCK_S", 3)
    monkeypatch.setattr(world, "_HARVEST_CONTEXT_S", 1)
    pieces, times_of_pieces = world_track("harvest", wav, sample_rate, cfg)
    np.testing.assert_allclose(times_of_pieces, times, rtol=1e-12)
    np.testing.assert_array_equal(pieces > 0, whole > 0)
    voiced = whole > 0
    assert voiced.sum() > 100
    assert np.abs(1200 * np.log2(pieces[voiced] / whole[voiced])).max() < 0.1


def test_pyin_in_blocks_is_pyin(real_audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wav, rate = soundfile.read(real_audio / "vocadito_1.flac", dtype="float32")
    wav, cfg = wav[rate : 6 * rate + 17], F0Config(method="pyin")
    whole, positions = pyin.pyin(wav, rate, cfg)
    lengths: list[int] = []
    contour = pyin._contour
    monkeypatch.setattr(pyin, "_BLOCK_S", 2)
    monkeypatch.setattr(pyin, "_CONTEXT_S", 1)
    monkeypatch.setattr(
        pyin, "_contour", lambda wav, *rest: (lengths.append(len(wav)), contour(wav, *rest))[1]
    )
    pieces, positions_of_pieces = pyin.pyin(wav, rate, cfg)
    np.testing.assert_array_equal(pieces, whole)
    np.testing.assert_array_equal(positions_of_pieces, positions)
    assert len(lengths) == 3 and max(lengths) < 4.1 * rate
