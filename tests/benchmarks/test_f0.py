"""The f0 benchmark: its songs' truth, its scores, its tables. No measured cost is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from benchmarks import f0 as bench
from benchmarks import f0_corpus as corpus
from benchmarks import f0_speed as speed
from pipeline.tools.formant_singer import ALTO, sing
from stages.f0 import F0Config, estimate_f0


@pytest.fixture(scope="module")
def made() -> dict[str, corpus.Condition]:
    """Four seconds of every condition."""
    return {condition.name: condition for condition in corpus.generated(4.0)}


def test_every_condition_is_there_and_the_same_each_time(
    made: dict[str, corpus.Condition],
) -> None:
    names = ["clean", "noise 20 dB", "noise 10 dB", "noise 0 dB", "reverb"]
    assert list(made) == [*names, "high soprano", "low bass", "growl", "breathy"]
    for again in corpus.generated(4.0):
        for clip, same in zip(made[again.name].clips, again.clips, strict=True):
            np.testing.assert_array_equal(clip.wav, same.wav)
            assert clip.wav.dtype == np.float32 and np.abs(clip.wav).max() < 1
            assert clip.f0.shape == (len(clip.wav) // corpus.HOP_LENGTH,)


@pytest.mark.parametrize("name", ["clean", "noise 20 dB", "high soprano", "low bass"])
def test_the_truth_is_the_pitch(made: dict[str, corpus.Condition], name: str) -> None:
    condition = made[name]
    cfg = F0Config(method="praat", hop_length=corpus.HOP_LENGTH, f0_max=condition.f0_max)
    for clip in condition.clips:
        found = estimate_f0(clip.wav, corpus.SAMPLE_RATE, cfg, len(clip.f0))
        both = (found > 0) & (clip.f0 > 0)
        cents = 1200 * np.log2(found[both] / clip.f0[both])
        assert both.sum() > 0.9 * (clip.f0 > 0).sum()
        assert np.mean(np.abs(cents) < 50) > 0.95
        assert abs(np.median(cents)) < 2


@pytest.mark.slow
def test_voices_reach_where_their_names_say(made: dict[str, corpus.Condition]) -> None:
    high = np.concatenate([clip.f0 for clip in corpus.generated(20.0)[5].clips])
    low = np.concatenate([clip.f0 for clip in made["low bass"].clips])
    assert 1100 < high.max() < made["high soprano"].f0_max
    assert 50 < low[low > 0].min() < 80


def test_noise_is_as_loud_as_it_says_and_pink(made: dict[str, corpus.Condition]) -> None:
    clean = made["clean"].clips[0]
    for snr_db in (20, 0):
        noisy = corpus.noisy(clean, snr_db, seed=3)
        gain = noisy.wav.astype(float) @ clean.wav / (clean.wav.astype(float) @ clean.wav)
        noise = noisy.wav / gain - clean.wav
        found_db = 10 * np.log10(corpus.sung_power(clean) / np.mean(noise**2))
        assert found_db == pytest.approx(snr_db, abs=0.5)
        power = np.abs(np.fft.rfft(noise)) ** 2
        hz = np.fft.rfftfreq(len(noise), 1 / corpus.SAMPLE_RATE)
        octaves = [power[(hz >= low) & (hz < 2 * low)].sum() for low in (200, 800, 3200)]
        assert max(octaves) < 1.5 * min(octaves)


def test_reverb_delays_nothing_and_holds_half_of_the_power() -> None:
    click = np.zeros(2 * corpus.SAMPLE_RATE, dtype=np.float32)
    click[1000] = 1
    truth = np.zeros(len(click) // corpus.HOP_LENGTH, dtype=np.float32)
    wet = corpus.reverberant(corpus.Clip(click, truth), seed=0).wav.astype(float)
    assert np.argmax(np.abs(wet)) == 1000 and not wet[:1000].round(6).any()
    assert (wet[1001:] ** 2).sum() / wet[1000] ** 2 == pytest.approx(0.5, rel=0.01)
    late = [np.sum(wet[1000 + 4410 * i :][:4410] ** 2) for i in (2, 8)]  # 0.6 s, half of 60 dB
    assert 10 * np.log10(late[0] / late[1]) == pytest.approx(30, abs=2)


@pytest.mark.slow
def test_a_growl_adds_harmonics_of_half_the_pitch_and_breath_adds_noise() -> None:
    def halves_db(growl: float) -> float:
        song = sing(replace(ALTO, growl=growl, vibrato_cents=0), 6.0, 44100, 0)
        power = np.abs(np.fft.rfft(song.wav[22050:] * np.hanning(len(song.wav) - 22050))) ** 2
        f0 = np.median(song.f0[song.f0 > 0])
        hz = np.fft.rfftfreq(len(song.wav) - 22050, 1 / 44100)
        below = power[(hz > 0.4 * song.f0[song.f0 > 0].min()) & (hz < 0.7 * f0)].max()
        return float(10 * np.log10(below / power.max()))

    assert halves_db(0.3) > halves_db(0.0) + 10
    plain, growling = sing(ALTO, 6.0, 44100, 0), sing(replace(ALTO, growl=0.3), 6.0, 44100, 0)
    np.testing.assert_array_equal(plain.f0, growling.f0)

    import parselmouth

    noise = [
        float(np.median(values[values > -100]))
        for voice in (ALTO, replace(ALTO, **corpus.BREATHY))
        for values in [
            parselmouth.Sound(sing(voice, 6.0, 44100, 0).wav.astype(np.float64), 44100)
            .to_harmonicity_cc()
            .values
        ]
    ]
    assert noise[1] < noise[0] - 6


def test_the_annotation_is_taken_at_our_samples(tmp_path: Path) -> None:
    assert corpus.vocadito(tmp_path) is None
    rate, f0 = corpus.SAMPLE_RATE, np.arange(41.0)
    sf.write(tmp_path / "vocadito_1.flac", np.zeros(40 * 256 + 100), rate)
    times = np.arange(41) * 256 / rate
    np.savetxt(tmp_path / "vocadito_1_f0.csv", np.stack([times, f0], axis=1), delimiter=",")
    condition = corpus.vocadito(tmp_path)
    assert condition is not None
    np.testing.assert_array_equal(condition.clips[0].f0, np.arange(0, 40, 2))
    np.savetxt(tmp_path / "vocadito_1_f0.csv", np.stack([2 * times, f0], axis=1), delimiter=",")
    with pytest.raises(SystemExit, match="every 256th sample"):
        corpus.vocadito(tmp_path)


def test_scores() -> None:
    truth = np.array([100, 100, 200, 0, 0, 300, 400.0])
    found = np.array([101, 50, 0, 0, 120, 309, 400.0])
    scores = bench.score(truth, found)
    assert scores.pitch == pytest.approx(2 / 5)
    assert scores.chroma == pytest.approx(3 / 5)
    assert scores.octaves == pytest.approx(1 / 4)
    assert scores.recall == pytest.approx(4 / 5)
    assert scores.false_alarm == pytest.approx(1 / 2)
    assert scores.overall == pytest.approx(3 / 7)
    assert scores.cents == pytest.approx(1200 * np.log2(1.01) / 2)
    assert bench.score(truth, truth).overall == 1
    nothing = bench.score(truth, np.zeros(7))
    assert nothing.pitch == nothing.octaves == nothing.false_alarm == 0
    assert bench.mean([scores, nothing]).recall == pytest.approx(2 / 5)
    assert bench.mean([scores, nothing]).cents == scores.cents, "nothing found, nothing to average"


def test_a_vote_takes_the_median_of_each_clip() -> None:
    def contours(*hz: float) -> bench.Contours:
        return {"a": [np.full(3, value, dtype=np.float32) for value in hz]}

    voted = bench.vote([contours(100, 200), contours(101, 401), contours(102, 200)])
    assert [row.tolist() for row in voted["a"]] == [[101] * 3, [200] * 3]


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two methods, from the songs to page and plots; what is there is not made again."""
    page = tmp_path / "f0.md"
    names = ("vocadito", "generated", "overall", "pitch", "thresholds", "speed")
    page.write_text("# f0\n" + "".join(f"<!-- table {n} -->\nstale\n<!-- end -->\n" for n in names))
    arguments = ["--methods", "praat", "dio", "--quick", "--audio", str(tmp_path)]
    arguments += ["--out", str(tmp_path / "out"), "--page", str(page)]
    bench.main(arguments)
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert set(figures["accuracy"]) == set(figures["speed"]) == {"praat", "dio"}
    assert figures["accuracy"]["praat"]["clean"]["pitch"] > 0.9
    for sides in figures["speed"].values():
        for cost in sides.values():
            assert cost["first"] > 0 and cost["steady"] > 0 and 30 < cost["peak_mb"] < 2000
    text = page.read_text()
    assert "stale" not in text and text.count("| praat") == 7 and "| rmvpe" in text
    assert "breathy" in text
    for plot in ("f0.png", "f0-conditions.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    bench.main([*arguments, "--resume"])
    assert "cost of" not in (again := capsys.readouterr().out) and "contours of" not in again
    assert page.read_text() == text
    page.write_text("# no places\n")
    with pytest.raises(SystemExit, match="no place for the table"):
        bench.main([*arguments, "--resume"])


@pytest.mark.slow
def test_the_calls_to_compare_with_find_the_same_pitch() -> None:
    """Theirs on their own clocks; the median pitch tells that it is the same work."""
    song = sing(ALTO, 3.0, speed.SAMPLE_RATE, 0)
    expected = np.median(song.f0[song.f0 > 0])
    for method in ("praat", "praat-cc", "dio", "harvest", "pyin", "crepe-tiny", "fcpe"):
        (found,) = speed.PAIRS[method].build(None)([song.wav])  # type: ignore[misc]
        f0 = np.ravel(found[0] if method == "crepe-tiny" else found)  # beside its periodicity
        assert np.median(f0[f0 > 0]) == pytest.approx(expected, rel=0.02), method
