"""One song through all stages: kept and dropped parts add up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile as sf

from stages.chain import (
    AudioConfig,
    ChainConfig,
    PreparedSong,
    StageClock,
    prepare_song,
    why_silent,
)
from stages.decode import DecodeConfig, Decoded, Decoder, Header
from stages.errors import Reason
from stages.flac import decode_flac
from stages.loudness import LoudnessConfig
from stages.pcm import dequantise
from stages.quality import QualityConfig, measure_quality
from stages.slice import SliceConfig
from stages.types import PcmFile
from tests.helpers.songs import tune

SHORT = ChainConfig(slice=SliceConfig(min_length_ms=1000))


@pytest.fixture
def decoder(tmp_path: Path) -> Iterator[Decoder]:
    with Decoder(DecodeConfig(), tmp_path / "scratch") as decoder:
        yield decoder


def prepare(path: Path, wav: np.ndarray, decoder: Decoder, cfg: ChainConfig) -> PreparedSong:
    sf.write(path, wav, 44100, subtype="FLOAT")
    song = prepare_song(bytes(path), decoder, cfg, StageClock())
    kept = sum(clip.span.stop - clip.span.start for clip in song.clips)
    dropped = round(sum(drop.seconds for drop in song.dropped) * song.sample_rate)
    assert kept + dropped == song.num_samples
    return song


@pytest.mark.parametrize("seconds", [0.6, 2.0, 4.0, 8.0, 21.0])
@pytest.mark.parametrize("level_db", [-120.0, -80.0, -45.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_silent_song_has_no_clips_whatever_its_length(
    tmp_path: Path, decoder: Decoder, seconds: float, level_db: float, seed: int
) -> None:
    noise = np.random.default_rng(seed).standard_normal(int(seconds * 44100))
    song = prepare(tmp_path / "a.wav", noise * 10 ** (level_db / 20), decoder, ChainConfig())
    assert song.clips == []
    reason, detail = song.why_empty()
    assert reason == Reason.SILENT
    number = re.search(
        r"its loudest 80 ms are at (-[\d.]+) dB, and slice.threshold_db is -40", detail
    )
    assert number and level_db < float(number[1]) < level_db + 2


CANCEL = r"channels cancel each other; decode\.channels=first reads one of them"
QUIET = r"its loudest 80 ms are at -\d\d\.\d dB, and slice\.threshold_db is -40"


@pytest.mark.parametrize(
    ("mixed", "peak", "channels", "words"),
    [
        (0.0, 0.3, "mean", rf"its 2 {CANCEL}"),
        (0.005, 0.3, "mean", rf"its 2 {CANCEL}"),  # not exactly opposite
        (0.005, 0.01, "mean", QUIET),  # one channel of two is used
        (0.004, 0.009, "mean", QUIET),  # the channels themselves are silent
        (0.0, 0.009, "mean", "it is digital silence"),
        (0.0, 0.3, "first", r"its first of 2 channels is silent; decode\.channels=mean mixes all"),
        (0.005, 0.005, "first", QUIET),
    ],
)
def test_the_cause_of_silence(
    tmp_path: Path, mixed: float, peak: float, channels: Literal["mean", "first"], words: str
) -> None:
    wav = mixed * np.sin(np.arange(3 * 16000) / 8)
    wav.astype("<f4").tofile(tmp_path / "song.f32")
    song = PcmFile(tmp_path / "song.f32", len(wav))
    decoded = Decoded(song, Header(16000, 2, len(wav), "WAV"), len(wav), peak)
    found = why_silent(decoded, 16000, SliceConfig(), DecodeConfig(channels=channels))
    assert re.fullmatch(words + ".*", found), found


def test_the_stages_read_the_samples_that_are_stored(tmp_path: Path, decoder: Decoder) -> None:
    song = prepare(tmp_path / "a.wav", tune(7), decoder, SHORT)
    assert len(song.clips) > 1
    for clip in song.clips:
        wav = dequantise(decode_flac(clip.flac, "PCM_16"), "PCM_16")
        assert len(wav) == clip.span.stop - clip.span.start
        assert measure_quality(wav, 44100) == clip.quality


def test_one_gain_a_song_or_one_a_clip(tmp_path: Path, decoder: Decoder) -> None:
    wav = tune(10) * np.repeat([1.0, 0.25], 5 * 44100)
    cfg = ChainConfig(slice=SHORT.slice, loudness=LoudnessConfig(per="clip"))
    by_song = prepare(tmp_path / "a.wav", wav, decoder, SHORT)
    by_clip = prepare(tmp_path / "a.wav", wav, decoder, cfg)
    assert len({clip.reading.gain_db for clip in by_song.clips}) == 1
    gains = [clip.reading.gain_db for clip in by_clip.clips]
    assert gains[-1] - gains[0] == pytest.approx(12.04, abs=0.5)


def test_a_threshold_filters_with_its_reason(tmp_path: Path, decoder: Decoder) -> None:
    cfg = ChainConfig(slice=SHORT.slice, quality=QualityConfig(min_bandwidth_hz=20000))
    song = prepare(tmp_path / "a.wav", tune(7), decoder, cfg)
    assert song.clips == []
    reason, words = song.why_empty()
    assert reason == "bandwidth" and "bandwidth" in words


def test_24_bit_clips(tmp_path: Path, decoder: Decoder) -> None:
    cfg = ChainConfig(slice=SHORT.slice, audio=AudioConfig(subtype="PCM_24"))
    song = prepare(tmp_path / "a.wav", tune(4), decoder, cfg)
    samples = decode_flac(song.clips[0].flac, "PCM_24")
    assert (samples % 256 != 0).any() and int(np.abs(samples).max()) > 2**16


def test_a_song_of_one_sample_is_too_short(tmp_path: Path, decoder: Decoder) -> None:
    song = prepare(tmp_path / "a.wav", np.array([0.5]), decoder, SHORT)
    assert song.why_empty()[0] == Reason.TOO_SHORT
