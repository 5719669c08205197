"""Slicing: parity with so-vits-svc's slicer, forced cuts, properties for any input."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import Reason
from stages.slice import (
    BLOCK_SAMPLES,
    SliceConfig,
    Span,
    kept_spans,
    rms_frames,
    slice_silence,
)
from stages.types import Array, PcmFile

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "preprocessing" / "slicer.npz"
with np.load(GOLDEN) as arrays:
    # so-vits-svc mistakes the channels of stereo for its length; those inputs are not stored.
    CASES = sorted(n for n in arrays if n.startswith(("so/", "openvpi/")) and "/stereo" not in n)
with np.load(GOLDEN.with_name("inputs.npz")) as arrays:
    SHA256 = {n.split("/")[1]: str(arrays[n]) for n in arrays if n.startswith("sha256/")}


def sine(seconds: float, level_db: float = -6.0, sample_rate: int = 16000) -> Array:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    wav = 10 ** (level_db / 20) * np.sqrt(2) * np.sin(2 * np.pi * 220 * time)
    return wav.astype(np.float32)


def peer_settings(case: str) -> SliceConfig:
    """The settings that a golden's name stands for."""
    if case == "def":
        return SliceConfig(max_length_ms=None)
    if match := re.fullmatch(r"th(-\d+)_min(\d+)", case):
        threshold_db, min_length_ms = map(int, match.groups())
        return SliceConfig(
            max_length_ms=None, threshold_db=threshold_db, min_length_ms=min_length_ms
        )
    match = re.fullmatch(r"cli(?:_minint(\d+))?", case)
    assert match, case
    return SliceConfig(
        max_length_ms=None,
        hop_ms=10,
        max_silence_kept_ms=500,
        min_interval_ms=int(match.group(1) or 300),
    )


def golden_input(name: str, real_audio: Path) -> tuple[Array, int]:
    if name.startswith("deg/"):
        with np.load(GOLDEN) as arrays:
            return arrays[f"in/{name}"].astype(np.float32) / 32768, 44100
    if name == "vocadito":
        wav, sample_rate = soundfile.read(real_audio / "vocadito_1.flac", dtype="float32")
        assert hashlib.sha256(wav.tobytes()).hexdigest() == SHA256[name]
        return wav, sample_rate
    with np.load(GOLDEN.with_name("slicer_songs.npz")) as arrays:
        sample_rate = int(arrays[f"{name}/sample_rate"])
        wav = np.repeat(arrays[f"{name}/level"], sample_rate // 100)
        return wav[: int(arrays[f"{name}/num_samples"])], sample_rate


@pytest.mark.parametrize("case", CASES)
def test_cuts_equal_the_references(case: str, real_audio: Path) -> None:
    """so-vits-svc returns every span; audio-slicer returns the sounding ones."""
    peer, *name, parameters = case.split("/")
    wav, sample_rate = golden_input("/".join(name), real_audio)
    spans = slice_silence(wav, sample_rate, peer_settings(parameters))
    found = [list(span) for span in spans]
    if peer == "openvpi":
        found = [[span.start, span.stop] for span in spans if not span.silent]
    with np.load(GOLDEN) as arrays:
        assert found == arrays[case].tolist()


def test_rms_equals_the_references(real_audio: Path) -> None:
    wav, sample_rate = golden_input("vocadito", real_audio)
    with np.load(GOLDEN) as arrays:
        expected = arrays["rms/vocadito/sr44100_win3528_hop882"]
    rms = rms_frames(wav, sample_rate, SliceConfig())
    # The peer squares, adds and takes the root in float32 (eps 1.2e-7).
    np.testing.assert_allclose(rms, expected, rtol=2.4e-7)


FRAMINGS = st.tuples(  # sample rate, hop, interval: even and odd windows, with and without a rest
    st.sampled_from([8000, 11025, 44100, 48000, 192000]),
    st.integers(1, 60),
    st.integers(1, 300),
).map(lambda f: (f[0], SliceConfig(hop_ms=min(f[1], f[2]), min_interval_ms=f[2])))


@settings(deadline=None, max_examples=60)
@given(framing=FRAMINGS, num_samples=st.integers(1, 20000), seed=st.integers(0, 99))
def test_rms_is_librosas(framing: tuple[int, SliceConfig], num_samples: int, seed: int) -> None:
    sample_rate, cfg = framing
    hop = round(sample_rate * cfg.hop_ms / 1000)
    win = min(round(sample_rate * cfg.min_interval_ms / 1000), 4 * hop)
    wav = np.random.default_rng(seed).standard_normal(num_samples)
    expected = librosa.feature.rms(y=wav, frame_length=win, hop_length=hop, dtype=np.float64)[0]
    rms = rms_frames(wav.astype(np.float32), sample_rate, cfg)
    np.testing.assert_allclose(rms, expected, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(
    framing=FRAMINGS,
    num_samples=st.integers(0, 30000),
    block_samples=st.integers(1, 20000),
    seed=st.integers(0, 99),
)
def test_block_size_does_not_change_a_bit(
    framing: tuple[int, SliceConfig], num_samples: int, block_samples: int, seed: int
) -> None:
    sample_rate, cfg = framing
    wav = np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)
    whole = rms_frames(wav, sample_rate, cfg, block_samples=1 << 20)
    blocks = rms_frames(wav, sample_rate, cfg, block_samples=block_samples)
    np.testing.assert_array_equal(whole, blocks)


def test_rows_and_long_rows_add_up_alike() -> None:
    """One hop of 19200 samples a block, against 40 of them in one."""
    cfg = SliceConfig(hop_ms=100, min_interval_ms=350)
    wav = np.random.default_rng(0).standard_normal(40 * 19200 + 7).astype(np.float32)
    whole = rms_frames(wav, 192000, cfg, block_samples=1 << 24)
    np.testing.assert_array_equal(whole, rms_frames(wav, 192000, cfg, block_samples=1))


class Watched:
    """Samples that note the longest slice taken from them."""

    def __init__(self, wav: Array) -> None:
        self.wav = wav
        self.longest = 0

    def __len__(self) -> int:
        return len(self.wav)

    def __getitem__(self, span: slice, /) -> Array:
        block = self.wav[span]
        self.longest = max(self.longest, len(block))
        return block


def test_a_song_is_read_in_blocks() -> None:
    wav = Watched(np.tile(np.concatenate([sine(7), np.zeros(16000, np.float32)]), 8))
    assert len(slice_silence(wav, 16000, SliceConfig())) == 16
    assert len(wav) > 3 * BLOCK_SAMPLES
    assert wav.longest <= BLOCK_SAMPLES


def test_a_file_is_cut_like_an_array(tmp_path: Path) -> None:
    wav = np.concatenate([sine(30), np.zeros(8000, np.float32), sine(6, -20)])
    wav.astype("<f4").tofile(tmp_path / "song.pcm")
    file = PcmFile(tmp_path / "song.pcm", len(wav))
    spans = slice_silence(wav, 16000, SliceConfig())
    assert slice_silence(file, 16000, SliceConfig()) == spans
    assert len(spans) >= 4


@st.composite
def configs(draw: st.DrawFn) -> SliceConfig:
    hop_ms = draw(st.integers(1, 40))
    min_interval_ms = draw(st.integers(hop_ms, 300))
    min_kept_ms = draw(st.integers(0, 400))
    longest = st.integers(max(1, min_kept_ms), 900)
    return SliceConfig(
        threshold_db=draw(st.sampled_from([-60.0, -40.0, -30.0, 0.0])),
        min_length_ms=draw(st.integers(min_interval_ms, 1500)),
        min_interval_ms=min_interval_ms,
        hop_ms=hop_ms,
        max_silence_kept_ms=draw(st.integers(hop_ms, 600)),
        max_length_ms=draw(st.none() | longest),
        min_kept_ms=min_kept_ms,
    )


@st.composite
def songs(draw: st.DrawFn) -> Array:
    """Stretches of noise at levels around the thresholds, digital silence among them."""
    stretches = st.tuples(st.sampled_from([0.3, 0.03, 0.003, 1e-5, 0.0]), st.integers(1, 5000))
    noise = np.random.default_rng(draw(st.integers(0, 9)))
    parts = [level * noise.standard_normal(n) for level, n in draw(st.lists(stretches, max_size=8))]
    return np.concatenate([*parts, np.zeros(0)]).astype(np.float32)


SAMPLE_RATES = st.sampled_from([1000, 4000, 8000, 11025])


@settings(deadline=None, max_examples=300)
@given(wav=songs(), sample_rate=SAMPLE_RATES, cfg=configs())
def test_spans_cover_any_song(wav: Array, sample_rate: int, cfg: SliceConfig) -> None:
    spans = slice_silence(wav, sample_rate, cfg)
    assert spans[0].start == 0
    assert spans[-1].stop == len(wav)
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert all(a.stop > a.start or a.silent or len(wav) == 0 for a in spans)
    assert slice_silence(wav.copy(), sample_rate, cfg) == spans


@settings(deadline=None, max_examples=300)
@given(wav=songs(), sample_rate=SAMPLE_RATES, cfg=configs())
def test_forced_cuts_keep_to_the_limits(wav: Array, sample_rate: int, cfg: SliceConfig) -> None:
    """Pieces are short enough, and long enough where that can be; silences are not cut."""
    if cfg.max_length_ms is None:
        return
    uncut_cfg = SliceConfig(**{**vars(cfg), "max_length_ms": None})
    pieces = slice_silence(wav, sample_rate, cfg)
    longest = max(1, sample_rate * cfg.max_length_ms / 1000)
    shortest = sample_rate * cfg.min_kept_ms / 1000
    for span in slice_silence(wav, sample_rate, uncut_cfg):
        inside = [p for p in pieces if span.start <= p.start and p.stop <= span.stop]
        if span.silent or span.stop - span.start <= longest:
            assert span in inside
            continue
        inside = [p for p in inside if not p.silent]
        lengths = [p.stop - p.start for p in inside]
        assert sum(lengths) == span.stop - span.start
        assert max(lengths) <= longest
        fewest = -(-sum(lengths) // int(longest))
        if fewest * np.ceil(shortest) <= sum(lengths):
            assert min(lengths) >= shortest
        if shortest <= longest / 3:
            assert min(lengths) >= longest // 3 - 1


@pytest.mark.parametrize("dip_s", [6.0, 9.0])
def test_forced_cut_falls_on_the_quietest_frame(dip_s: float) -> None:
    wav = sine(18.0)
    dip = slice(round((dip_s - 0.06) * 16000), round((dip_s + 0.06) * 16000))
    wav[dip] *= 0.1  # -26 dBFS: above the threshold, so no silence
    spans = slice_silence(wav, 16000, SliceConfig())
    assert len(spans) == 2
    assert not any(span.silent for span in spans)
    assert abs(spans[0].stop / 16000 - dip_s) <= 0.02


def test_of_equally_quiet_frames_the_first_is_cut() -> None:
    """A constant has equal frames everywhere: the window's first frame is taken, a third in."""
    spans = slice_silence(np.full(20 * 16000, 0.5, np.float32), 16000, SliceConfig())
    assert [span.stop for span in spans] == [5 * 16000, 20 * 16000]


def test_just_over_the_limit_leaves_no_crumb() -> None:
    wav = sine(15.001)
    spans = slice_silence(wav, 16000, SliceConfig())
    assert len(spans) == 2
    assert min(span.stop - span.start for span in spans) >= 5 * 16000


def test_all_silent_is_one_silent_span() -> None:
    assert slice_silence(np.zeros(32000, np.float32), 16000, SliceConfig()) == [
        Span(0, 32000, True)
    ]


@pytest.mark.parametrize("num_zeros", range(4000, 8000, 160))
def test_trailing_silence_counts_from_the_interval_on(num_zeros: int) -> None:
    wav = np.concatenate([sine(6), np.zeros(num_zeros, np.float32)])
    audible = np.flatnonzero(rms_frames(wav, 16000, SliceConfig()) >= 0.01)
    num_silent_frames = len(rms_frames(wav, 16000, SliceConfig())) - 1 - audible[-1]
    spans = slice_silence(wav, 16000, SliceConfig())
    assert spans[-1].silent == (num_silent_frames >= 15)


def test_nothing_is_one_empty_span() -> None:
    spans = slice_silence(np.zeros(0, np.float32), 16000, SliceConfig())
    assert spans == [Span(0, 0, False)]
    assert kept_spans(spans, 16000, SliceConfig()) == ([], [])


def test_kept_and_dropped_spans() -> None:
    just, short = Span(100, 8100, False), Span(8100, 16099, False)
    silent, mark = Span(0, 100, True), Span(8100, 8100, True)
    kept, dropped = kept_spans([silent, just, mark, short], 16000, SliceConfig(min_kept_ms=500))
    assert kept == [just]
    assert dropped == [(silent, Reason.SILENCE), (short, Reason.TOO_SHORT)]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"threshold_db": float("nan")}, "slice.threshold_db"),
        ({"hop_ms": 0}, "slice.hop_ms"),
        ({"min_interval_ms": 10}, "slice.min_interval_ms"),
        ({"min_length_ms": 200}, "slice.min_length_ms"),
        ({"max_silence_kept_ms": 10}, "slice.max_silence_kept_ms"),
        ({"max_length_ms": 0}, "slice.max_length_ms"),
        ({"max_length_ms": 400}, "slice.min_kept_ms"),
        ({"min_kept_ms": -1}, "slice.min_kept_ms"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        SliceConfig(**wrong)  # type: ignore[arg-type]
