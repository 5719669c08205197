"""Songs in pieces: every sounding frame in one piece, and joining to one song."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from stages.pieces import Joiner, Piece, crossfade, plan_pieces, read_frames, stretches
from stages.slice import SliceConfig, Span, slice_silence
from stages.types import Array

HOP = 16


def spans_of(*lengths: int) -> list[Span]:
    """Spans one after the other; a negative length is silent."""
    ends = np.cumsum(np.abs(lengths)).tolist()
    starts = [0, *ends[:-1]]
    return [
        Span(start, stop, length < 0)
        for start, stop, length in zip(starts, ends, lengths, strict=True)
    ]


def some_spans(seed: int) -> list[Span]:
    """Sounding and silent ones of 0 to 20 frames, at no multiple of anything."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 1, HOP // 2, HOP - 1, HOP, 37, 100, 5 * HOP, 317], size=12)
    return spans_of(*(lengths * rng.choice([-1, 1, 1], size=12)).tolist())


def plan(spans: Sequence[Span], pad: int = 40, fade: int = 20) -> list[Piece]:
    return plan_pieces(spans, spans[-1].stop, HOP, pad, fade)


def join(pieces: Sequence[Piece], sounds: Sequence[Array], num_samples: int) -> Array:
    joiner = Joiner(HOP)
    parts = [joiner.add(piece, wav) for piece, wav in zip(pieces, sounds, strict=True)]
    return np.concatenate([*parts, joiner.finish(num_samples)])


def read(song: Array, pieces: Sequence[Piece]) -> list[Array]:
    return [read_frames(song, piece.read_start, piece.read_stop, HOP) for piece in pieces]


def gains(pieces: Sequence[Piece], num_samples: int) -> Array:
    """(T,) of a steady sound of 1 that every piece has."""
    ones = [np.ones(piece.frames * HOP, np.float32) for piece in pieces]
    return join(pieces, ones, num_samples)


SONGS = [pytest.param(some_spans(seed), id=str(seed)) for seed in range(20)]


@pytest.mark.parametrize("spans", SONGS)
def test_pieces_lie_in_order_and_cover_what_sounds(spans: list[Span]) -> None:
    pieces = plan(spans)
    song = spans[-1].stop
    frames = [(piece.start, piece.stop) for piece in pieces]
    assert all(start < stop for start, stop in frames)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(frames))
    covered = np.zeros(song, bool)
    for start, stop in frames:
        covered[start * HOP : stop * HOP] = True
    assert all(0 <= start and stop <= -(-song // HOP) for start, stop in frames)
    for span in spans:  # half a frame at either end may go to the neighbour
        first = 0 if span.start == 0 else span.start + HOP // 2
        last = song if span.stop == song else span.stop - HOP // 2
        assert (covered[first : max(first, last)] != span.silent).all()


@pytest.mark.parametrize("spans", SONGS)
def test_neighbours_agree_on_their_boundary(spans: list[Span]) -> None:
    pieces = plan(spans)
    for before, after in itertools.pairwise(pieces):
        assert after.joined == (before.stop == after.start)
        if after.joined:
            assert before.fade_out == after.fade_in > 0
    assert all(not group[0].joined for group in stretches(pieces))
    assert all(piece.joined for group in stretches(pieces) for piece in group[1:])
    assert list(itertools.chain(*stretches(pieces))) == pieces


@pytest.mark.parametrize("fade", [0, 1, 20, 1000])
@pytest.mark.parametrize("spans", SONGS)
def test_fades_lie_in_what_fades_and_in_what_is_read(spans: list[Span], fade: int) -> None:
    end = -(-spans[-1].stop // HOP)
    pieces = plan(spans, pad=fade, fade=fade)
    for i, piece in enumerate(pieces):
        before = pieces[i - 1].stop if i else 0
        after = pieces[i + 1].start if i + 1 < len(pieces) else end
        assert piece.fade_in + piece.fade_out <= (piece.stop - piece.start) * HOP
        assert max(piece.fade_in, piece.fade_out) <= min(fade / 2, piece.pad * HOP)
        if not piece.joined:  # two fades share a silence
            assert 2 * piece.fade_in <= (piece.start - before) * HOP
        if i + 1 == len(pieces) or not pieces[i + 1].joined:
            assert 2 * piece.fade_out <= (after - piece.stop) * HOP


def test_a_fade_is_as_long_as_it_may_be() -> None:
    first, second, third = plan(spans_of(100 * HOP, 3 * HOP, -HOP, 100 * HOP), fade=90)
    assert (first.fade_in, first.fade_out, second.fade_in) == (0, 24, 24)
    assert (second.fade_out, third.fade_in, third.fade_out) == (8, 8, 0)
    assert [piece.joined for piece in (first, second, third)] == [False, True, False]


def test_context_is_rounded_up_to_frames_and_never_less_than_the_fade() -> None:
    (piece,) = plan(spans_of(50 * HOP), pad=HOP + 1, fade=0)
    assert (piece.pad, piece.read_start, piece.read_stop, piece.frames) == (2, -2, 52, 54)
    (piece,) = plan(spans_of(50 * HOP), pad=0, fade=3 * HOP)
    assert piece.pad == 3


@pytest.mark.parametrize("num_samples", [1, HOP - 1, HOP, HOP + 1])
def test_a_song_of_a_frame_is_one_piece(num_samples: int) -> None:
    (piece,) = plan([Span(0, num_samples, False)])
    assert (piece.start, piece.stop) == (0, -(-num_samples // HOP))
    assert (piece.fade_in, piece.fade_out, piece.joined) == (0, 0, False)
    song = np.linspace(0.1, 0.9, num_samples, dtype=np.float32)
    found = join([piece], read(song, [piece]), num_samples)[:num_samples]
    np.testing.assert_array_equal(found, song)


@pytest.mark.parametrize("spans", [[Span(0, 0, False)], spans_of(-1), spans_of(-5000, -1)])
def test_where_nothing_sounds_there_are_no_pieces_but_a_silent_song(spans: list[Span]) -> None:
    assert plan(spans) == []
    np.testing.assert_array_equal(join([], [], spans[-1].stop), np.zeros(spans[-1].stop))


def test_a_silence_that_is_shorter_than_half_a_frame_is_none() -> None:
    assert [p.joined for p in plan(spans_of(100, -(HOP // 2 - 5), 100))] == [False, True]
    silent = [Span(0, 96, False), Span(96, 96, True), Span(96, 200, False)]
    assert [p.joined for p in plan(silent)] == [False, True]


@pytest.mark.parametrize("spans", SONGS)
def test_a_steady_sound_through_all_pieces_stays_as_it_is(spans: list[Span]) -> None:
    pieces, song = plan(spans), spans[-1].stop
    gain = gains(pieces, song)
    assert gain.dtype == np.float32
    inside = np.zeros(len(gain), bool)
    for piece in pieces:
        first = piece.start * HOP + (0 if piece.joined else piece.fade_in)
        inside[first : piece.stop * HOP - piece.fade_out] = True
        if piece.joined:
            inside[piece.start * HOP - piece.fade_in : piece.start * HOP] = True
    np.testing.assert_allclose(gain[inside], 1, rtol=0, atol=1e-6)
    assert (gain[:song] >= 0).all() and (gain <= 1 + 1e-6).all()


@pytest.mark.parametrize("spans", SONGS)
def test_the_song_is_as_long_as_it_was_and_grows_in_order(spans: list[Span]) -> None:
    pieces, song = plan(spans), spans[-1].stop
    joiner, given = Joiner(HOP), 0
    for piece in pieces:
        given += len(joiner.add(piece, np.ones(piece.frames * HOP, np.float32)))
        assert given == piece.stop * HOP - piece.fade_out
    given += len(joiner.finish(song))
    # A last frame that sounds is given whole.
    assert given == max(song, pieces[-1].stop * HOP if pieces else 0) < song + HOP


@pytest.mark.parametrize("spans", SONGS)
def test_a_song_that_is_left_as_it_is_comes_out_as_it_is(spans: list[Span]) -> None:
    song = np.random.default_rng(1).uniform(-1, 1, spans[-1].stop).astype(np.float32)
    pieces = plan(spans)
    found = join(pieces, read(song, pieces), len(song))[: len(song)]
    gain = gains(pieces, len(song))[: len(song)]
    np.testing.assert_allclose(found, song * gain, rtol=0, atol=1e-6)


def test_at_the_ends_of_a_song_nothing_fades() -> None:
    spans = spans_of(1000, -400, 1000)
    gain = gains(plan(spans), 2400)[:2400]
    assert gain[0] == gain[-1] == 1
    np.testing.assert_array_equal(gain[1008 + 10 : 1408 - 10], 0)  # frames 63 to 88 are silent
    fall, rise = gain[1008 - 10 : 1008 + 10], gain[1408 - 10 : 1408 + 10]
    assert (np.diff(fall) < 0).all()
    np.testing.assert_array_equal(fall, rise[::-1])


def test_a_sound_comes_and_goes_evenly_around_its_ends() -> None:
    gain = gains(plan(spans_of(-(40 * HOP), 40 * HOP, -(40 * HOP)), fade=64), 120 * HOP)
    np.testing.assert_array_equal(gain[: 40 * HOP - 32], 0)
    rise = gain[40 * HOP - 32 : 40 * HOP + 32]
    assert (np.diff(rise) > 0).all()
    np.testing.assert_allclose(rise + rise[::-1], 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(gain[80 * HOP - 32 : 80 * HOP + 32], rise[::-1], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(gain[80 * HOP + 32 :], 0)


def test_without_a_fade_pieces_meet_in_a_sample() -> None:
    pieces = plan(spans_of(5 * HOP, 5 * HOP), fade=0)
    low, high = (
        np.full(piece.frames * HOP, level, np.float32)
        for piece, level in zip(pieces, (0.25, 0.5), strict=True)
    )
    found = join(pieces, [low, high], 10 * HOP)
    np.testing.assert_array_equal(found, np.repeat([0.25, 0.5], 5 * HOP).astype(np.float32))


def test_a_crossfade_of_sounds_with_nothing_in_common_keeps_their_power() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.standard_normal((2, 400, 2205)).astype(np.float32)
    power = [np.mean(np.square(crossfade(a, b))) for a, b in zip(old, new, strict=True)]
    assert abs(10 * np.log10(np.mean(power))) < 0.1


def test_a_crossfade_of_one_sound_is_that_sound_at_any_level() -> None:
    wav = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    np.testing.assert_allclose(crossfade(wav, wav), wav, rtol=0, atol=1e-6)
    found = crossfade(wav, 0.5 * wav)  # alike, and half as loud
    assert (np.abs(found) <= np.abs(wav) + 1e-6).all()
    assert (np.abs(found) >= np.abs(0.5 * wav) - 1e-6).all()
    np.testing.assert_allclose(found[[0, -1]], wav[[0, -1]] * [1, 0.5], rtol=0.01)


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_a_crossfade_with_silence_or_with_nothing_is_finite(other: float) -> None:
    zeros, wav = np.zeros(64, np.float32), np.full(64, other, np.float32)
    assert np.isfinite(crossfade(zeros, wav)).all() and np.isfinite(crossfade(wav, zeros)).all()
    assert crossfade(zeros[:0], zeros[:0]).shape == (0,)
    assert crossfade(zeros, wav).dtype == np.float32


@pytest.mark.parametrize("start, stop", [(-3, -1), (-3, 2), (0, 4), (5, 9), (20, 22), (3, 3)])
def test_frames_beyond_the_song_are_silent(start: int, stop: int) -> None:
    song = np.arange(1, 100, dtype=np.float32)  # six frames and three samples
    found = read_frames(song, start, stop, HOP)
    around = np.pad(song, (3 * HOP, 30 * HOP))
    np.testing.assert_array_equal(found, around[(start + 3) * HOP : (stop + 3) * HOP])


def test_the_slicer_s_spans_of_a_song() -> None:
    rate = 1000
    rng = np.random.default_rng(0)
    song = rng.normal(0, 0.2, 60 * rate).astype(np.float32)
    song[20 * rate : 32 * rate] = 0
    spans = slice_silence(song, rate, SliceConfig(max_silence_kept_ms=500))
    pieces = plan_pieces(spans, len(song), HOP, 500, 50)
    assert sum(piece.joined for piece in pieces) >= 2  # cuts of what sounds too long
    assert len(stretches(pieces)) == 2
    found = join(pieces, read(song, pieces), len(song))[: len(song)]
    np.testing.assert_allclose(found, song, rtol=0, atol=1e-5)
