"""Metrics of a conversion tell good from bad and do not depend on the blocks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from pipeline.convert.metrics import (
    compare_f0,
    envelope_distance,
    long_term_envelope,
    measure_f0,
)
from pipeline.tools.formant_singer import ALTO, BASS, sing
from stages.f0 import F0Config, estimate_f0

RATE, HOP = 16000, 320


def test_cents_are_counted_where_both_are_voiced() -> None:
    target = np.array([0, 0, 100, 100, 200, 200, 400, 400], np.float32)
    measured = target * 2 ** (np.array([0, 0, 20, -40, 60, 1200, 0, 0], np.float32) / 1200)
    measured[1], measured[7] = 300, 0
    agreement = compare_f0(target, measured.astype(np.float32))
    assert agreement.near == 3 / 5, "20, 40 and 0 cents; not 60 and 1200"
    assert agreement.median_cents == pytest.approx(40, abs=1e-3)
    assert agreement.voicing_agreement == 6 / 8
    assert compare_f0(target, measured.astype(np.float32), cents=61).near == 4 / 5


def test_what_is_not_there_is_nan() -> None:
    nothing, sung = np.zeros(4, np.float32), np.full(4, 100, np.float32)
    agreement = compare_f0(nothing, sung)
    assert math.isnan(agreement.near) and math.isnan(agreement.median_cents)
    assert agreement.voicing_agreement == 0
    assert compare_f0(nothing, nothing).voicing_agreement == 1
    assert all(
        math.isnan(value) for value in dataclasses.astuple(compare_f0(nothing[:0], nothing[:0]))
    )


@pytest.mark.slow
def test_a_long_song_has_the_pitch_of_the_song_as_a_whole() -> None:
    sung = sing(ALTO, 65, RATE, seed=3, hop_length=HOP)
    measured = measure_f0(sung.wav, RATE, HOP, len(sung.f0))
    cfg = F0Config(method="praat", hop_length=HOP)
    whole = estimate_f0(sung.wav, RATE, cfg, n_frames=len(sung.f0))
    agreement = compare_f0(whole, measured)
    assert agreement.voicing_agreement > 0.998 and agreement.near > 0.999
    assert compare_f0(sung.f0, measured).near > 0.97


def test_a_voice_above_the_usual_range_is_followed() -> None:
    t = np.arange(RATE) / RATE
    wav = sum(np.sin(2 * np.pi * 1500 * k * t) / k for k in (1, 2, 3)) * 0.2
    f0 = measure_f0(wav.astype(np.float32), RATE, HOP, len(t) // HOP, 1500.0)
    assert np.median(f0[5:-5]) == pytest.approx(1500, rel=0.002)


@pytest.mark.slow
def test_envelopes_tell_voices_apart_and_not_levels() -> None:
    bass = [long_term_envelope(sing(BASS, 20, RATE, seed).wav, RATE) for seed in (1, 2)]
    alto = [long_term_envelope(sing(ALTO, 20, RATE, seed).wav, RATE) for seed in (1, 2)]
    assert bass[0].shape == (80,) and abs(bass[0].mean()) < 1e-9
    own = max(envelope_distance(*bass), envelope_distance(*alto))
    other = min(envelope_distance(a, b) for a in alto for b in bass)
    assert own < 0.7 * other

    wav = sing(BASS, 20, RATE, 1).wav
    louder = long_term_envelope(1.7 * wav, RATE)
    assert envelope_distance(louder, bass[0]) < 0.05
    assert envelope_distance(bass[0], bass[0] + np.tile([3.0, -3.0], 40)) == pytest.approx(3)


def test_envelopes_have_their_limits() -> None:
    assert np.isnan(long_term_envelope(np.zeros(RATE, np.float32), RATE)).all()
    with pytest.raises(ValueError, match=r"8000 Hz is too low.*use 16000 Hz or more"):
        long_term_envelope(np.zeros(8000, np.float32), 8000)
