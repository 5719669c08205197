"""The demo corpus: what is in it, that it is the same every time, and that it harms no one's files.

Also that its truth is true of the files as written, stereo and lossy ones included.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from pipeline.errors import UserError
from pipeline.songs.corpus import list_corpus
from pipeline.tools.demo_corpus import make_demo_corpus, read_truth
from stages.f0 import F0Config, estimate_f0
from stages.frames import resize_contour

FAULTY = {"bass/damaged.flac", "soprano/silent.wav"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_corpus(tmp_path_factory.mktemp("demo") / "corpus", minutes=0.9, seed=3)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def songs(folder: Path) -> list[str]:
    return [s.song_id for s in list_corpus(folder).songs if s.song_id not in FAULTY]


def test_three_speakers_three_rates_three_formats_mono_and_stereo(demo: Path) -> None:
    listed = list_corpus(demo)
    assert {song.speaker for song in listed.songs} == {"bass", "alto", "soprano"}
    assert not listed.ignored, "the truth beside the songs must not be listed as anything"
    assert FAULTY < {song.song_id for song in listed.songs}
    infos = [sf.info(str(demo / song_id)) for song_id in songs(demo)]
    assert {info.samplerate for info in infos} == {44100, 48000, 22050}
    assert {info.channels for info in infos} == {1, 2}
    assert {info.format for info in infos} == {"WAV", "FLAC", "OGG"}
    assert len({(info.samplerate, info.format) for info in infos}) == 9
    assert sum(info.duration for info in infos) == pytest.approx(0.9 * 60, abs=0.1)


def test_truth_holds_for_the_files_as_written(demo: Path) -> None:
    for song_id in songs(demo):
        wav, rate = sf.read(demo / song_id, dtype="float32", always_2d=True)
        f0 = estimate_f0(wav.mean(axis=1), rate, F0Config(method="praat", f0_max=900))
        times_s, truth_hz = read_truth(demo, song_id)
        assert times_s[-1] == pytest.approx(len(wav) / rate, abs=0.011)
        truth = resize_contour(truth_hz, times_s * rate, len(f0), 512, mode="nearest")
        both = (f0 > 0) & (truth > 0)
        assert both.sum() > 0.85 * (truth > 0).sum(), song_id
        cents = np.abs(1200 * np.log2(f0[both] / truth[both]))
        assert np.mean(cents < 50) >= 0.97, song_id


def test_speakers_differ_in_range(demo: Path) -> None:
    median = {}
    for speaker in ("bass", "alto", "soprano"):
        f0 = np.concatenate([read_truth(demo, s)[1] for s in songs(demo) if s.startswith(speaker)])
        median[speaker] = np.median(f0[f0 > 0])
    assert 1.3 * median["bass"] < median["alto"] < median["soprano"] / 1.15


def test_the_damaged_file_is_damaged_and_the_silent_one_silent(demo: Path) -> None:
    with pytest.raises(sf.LibsndfileError):
        sf.read(demo / "bass/damaged.flac")
    wav, rate = sf.read(demo / "soprano/silent.wav")
    assert len(wav) >= 3 * rate and np.sqrt(np.mean(wav**2)) < 1e-3


@pytest.mark.slow
def test_same_seed_same_bytes(demo: Path, tmp_path: Path) -> None:
    again = make_demo_corpus(tmp_path / "again", minutes=0.9, seed=3)
    assert contents(again) == contents(demo)
    other = make_demo_corpus(tmp_path / "other", minutes=0.9, seed=4)
    same = contents(demo).items() & contents(other).items()
    assert not same, "another seed must change every file"


def test_ogg_streams_have_a_fixed_serial_and_valid_checksums(demo: Path) -> None:
    for song_id in songs(demo):
        if song_id.endswith(".ogg"):
            data = (demo / song_id).read_bytes()
            assert data.count(b"OggS" + bytes([0])) > 3
            assert {
                struct.unpack_from("<I", data, at + 14)[0]
                for at in range(len(data))
                if data.startswith(b"OggS\0", at)
            } == {0x43414E54}
            damaged = bytearray(data)
            damaged[len(data) // 2] ^= 1  # a reader that checks must now lose a page
            intact, _ = sf.read(demo / song_id)
            (demo.parent / "damaged.ogg").write_bytes(damaged)
            lossy, _ = sf.read(demo.parent / "damaged.ogg")
            assert len(intact) > 0 and not np.array_equal(intact, lossy)


def test_a_finished_corpus_is_left_alone(demo: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    make_demo_corpus(demo, minutes=0.9, seed=3)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == times


@pytest.mark.slow
def test_a_damaged_or_other_demo_corpus_is_made_anew(demo: Path, tmp_path: Path) -> None:
    folder = make_demo_corpus(tmp_path / "corpus", minutes=0.2, seed=1)
    (folder / "alto" / "song-01.flac").write_bytes(b"cut")
    (folder / "bass" / "song-02.wav").unlink()
    make_demo_corpus(folder, minutes=0.9, seed=3)
    assert contents(folder) == contents(demo)


def test_a_corpus_left_half_made_is_made_again(tmp_path: Path, monkeypatch) -> None:
    written = []
    write_bytes = Path.write_bytes

    def dies_at_the_tenth(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) == 10:
            raise KeyboardInterrupt
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", dies_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        make_demo_corpus(tmp_path / "corpus", minutes=0.2)
    monkeypatch.undo()
    make_demo_corpus(tmp_path / "corpus", minutes=0.2)
    assert contents(tmp_path / "corpus") == contents(
        make_demo_corpus(tmp_path / "other", minutes=0.2)
    )


@pytest.mark.parametrize("name", ["notes.txt", "bass/mine.wav", ".truth/mine.csv"])
@pytest.mark.parametrize("made", [False, True])
def test_files_of_others_are_never_touched(tmp_path: Path, name: str, made: bool) -> None:
    folder = tmp_path / "corpus"
    if made:
        make_demo_corpus(folder, minutes=0.2)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(UserError, match="not part of a demo corpus"):
        make_demo_corpus(folder, minutes=0.3)
    assert contents(folder) == before


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--minutes is .*; it must lie in 0\.2 to 600"):
        make_demo_corpus(tmp_path / "corpus", minutes=0)
    with pytest.raises(UserError, match="seed"):
        make_demo_corpus(tmp_path / "corpus", seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        make_demo_corpus(tmp_path / "file")
