"""The file of a converted song: its format, its length to the sample, and all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile as sf

from pipeline.convert.config import OutputConfig
from pipeline.convert.output_file import SongFile, check_output
from pipeline.errors import UserError
from stages.decode import Decoded, Header
from stages.pcm import quantise
from stages.resample import ResampleConfig, resample
from stages.types import Array, PcmFile

RATE = 16000  # the voice's
SOXR = ResampleConfig()


def song(rate: int, samples: int) -> Decoded:
    """Return the header of a song with this rate and length; its samples are never read."""
    return Decoded(PcmFile(Path("none"), 0), Header(rate, 2, samples, "WAV"), samples)


def tone(samples: int, level: float = 0.5) -> Array:
    return (level * np.sin(np.arange(samples) * 0.2)).astype(np.float32)


def write(
    path: Path,
    wav: Array,
    decoded: Decoded | None = None,
    cfg: OutputConfig | None = None,
    cuts: Sequence[int] = (),
) -> SongFile:
    decoded = decoded or song(RATE, len(wav))
    with SongFile(path, cfg or OutputConfig(), decoded, SOXR, RATE) as file:
        for block in np.split(wav, cuts):
            file.write(block)
    return file


FORMATS = [
    (".wav", "PCM_16", "WAV", "PCM_16", 1.6e-5),
    (".wav", "PCM_24", "WAV", "PCM_24", 6e-8),
    (".wav", "FLOAT", "WAV", "FLOAT", 0.0),
    (".flac", "PCM_16", "FLAC", "PCM_16", 1.6e-5),
    (".FLAC", "PCM_24", "FLAC", "PCM_24", 6e-8),
    (".ogg", "PCM_16", "OGG", "VORBIS", 0.05),
    (".mp3", "PCM_16", "MP3", "MPEG_LAYER_III", 0.05),
]


@pytest.mark.parametrize("channels", ["mono", "dual"])
@pytest.mark.parametrize("suffix, subtype, kind, stored, error", FORMATS)
def test_every_format_reads_back(
    suffix: str, subtype: str, kind: str, stored: str, error: float, channels: str, tmp_path: Path
) -> None:
    wav = tone(40000)
    path = tmp_path / "deep" / f"song{suffix}"
    file = write(path, wav, cfg=OutputConfig(subtype=subtype, channels=channels), cuts=[1, 30000])
    info = sf.info(path)
    assert (info.format, info.subtype, info.samplerate) == (kind, stored, RATE)
    found, _ = sf.read(path, always_2d=True)
    assert found.shape == (40000, 1 if channels == "mono" else 2)
    np.testing.assert_allclose(found[1000:-1000, 0], wav[1000:-1000], rtol=0, atol=error)
    np.testing.assert_allclose(found[:, 0], found[:, -1], rtol=0, atol=error)
    assert (file.num_samples, file.notices) == (40000, [])
    assert file.peak == np.abs(wav).max()


@pytest.mark.parametrize("samples", [1, 2, 441, 44101])
@pytest.mark.parametrize("source", [8000, 22050, 44100, 48000, 47999, 96000])
@pytest.mark.parametrize("rate", [None, 8000, 16001, 44100, 48000])
def test_as_long_as_the_source_at_the_rate_asked_for(
    source: int, rate: int | None, samples: int, tmp_path: Path
) -> None:
    """Whatever the rate of the voice between them, and however long its last frame."""
    wav = tone(-(-samples * RATE // source) + 13)
    cfg = OutputConfig(sample_rate=rate)
    file = write(tmp_path / "song.wav", wav, song(source, samples), cfg, cuts=[len(wav) // 3])
    asked = rate or RATE
    found, written = sf.read(tmp_path / "song.wav")
    assert written == asked
    assert len(found) == file.num_samples == -(-samples * asked // source)


def test_what_is_missing_at_the_end_is_silence(tmp_path: Path) -> None:
    write(tmp_path / "song.wav", tone(500), song(RATE, 800))
    found, _ = sf.read(tmp_path / "song.wav")
    assert len(found) == 800 and not found[500:].any() and found[:500].any()


@pytest.mark.parametrize("rate", [None, 44100])
def test_blocks_of_any_length_give_the_same_samples(rate: int | None, tmp_path: Path) -> None:
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, 30000).astype(np.float32)
    cfg = OutputConfig(sample_rate=rate, subtype="FLOAT")
    write(tmp_path / "whole.wav", wav, cfg=cfg)
    write(tmp_path / "blocks.wav", wav, cfg=cfg, cuts=[0, 0, 1, 7, 9000, 9001, 29999])
    whole, blocks = (sf.read(tmp_path / name)[0] for name in ("whole.wav", "blocks.wav"))
    np.testing.assert_array_equal(whole, blocks)
    expected = resample(wav, RATE, rate or RATE, SOXR)
    np.testing.assert_array_equal(whole.astype(np.float32), expected)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("subtype, bits", [("PCM_16", 16), ("PCM_24", 24)])
def test_integers_are_rounded_to_the_nearest(
    suffix: str, subtype: Literal["PCM_16", "PCM_24"], bits: int, tmp_path: Path
) -> None:
    steps = np.random.default_rng(0).integers(-(2**15), 2**15, 5000)
    wav = ((steps + 0.4) / 2**15).astype(np.float32)
    write(tmp_path / f"song{suffix}", wav, cfg=OutputConfig(subtype=subtype))
    found, _ = sf.read(tmp_path / f"song{suffix}")
    np.testing.assert_array_equal(found * 2 ** (bits - 1), quantise(wav, subtype))
    if bits == 16:
        np.testing.assert_array_equal(found * 2**15, steps)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_clipping_is_said(suffix: str, tmp_path: Path) -> None:
    wav = tone(2000)
    wav[100:103] = [1.5, -2.0, 1.0]
    file = write(tmp_path / f"song{suffix}", wav)
    (notice,) = file.notices
    assert notice.startswith("2 samples exceed full scale") and "+6.0 dB" in notice
    assert file.peak == 2
    if suffix in (".wav", ".flac"):
        found, _ = sf.read(tmp_path / f"song{suffix}")
        np.testing.assert_array_equal(found[100:103], np.array([32767, -32768, 32767]) / 32768)


def test_floats_keep_what_is_too_loud(tmp_path: Path) -> None:
    file = write(tmp_path / "song.wav", tone(2000, 3.0), cfg=OutputConfig(subtype="FLOAT"))
    assert file.notices == [] and file.peak > 2.9
    np.testing.assert_array_equal(sf.read(tmp_path / "song.wav", dtype="float32")[0], tone(2000, 3))
    lossy = write(tmp_path / "song.ogg", tone(2000, 3.0), cfg=OutputConfig(subtype="FLOAT"))
    assert len(lossy.notices) == 1  # it has no floats


def test_an_error_leaves_nothing_behind_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(b"before")
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        SongFile(path, OutputConfig(), song(RATE, 50000), SOXR, RATE) as file,
    ):
        file.write(tone(30000))
        assert path.read_bytes() == b"before"
        raise RuntimeError("in the middle")
    assert [p.name for p in tmp_path.iterdir()] == ["song.wav"]
    assert path.read_bytes() == b"before"


def test_a_file_takes_the_place_of_the_one_before_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(b"before")
    with SongFile(path, OutputConfig(), song(RATE, 5000), SOXR, RATE) as file:
        file.write(tone(5000))
        assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["song.wav"]
    assert len(sf.read(path)[0]) == 5000


def test_a_full_disk_is_a_fault_of_the_storage(small_disk: Path) -> None:
    path = small_disk / "song.wav"
    path.write_bytes(b"before")
    noise = np.random.default_rng(0).uniform(-1, 1, 4_000_000).astype(np.float32)
    with pytest.raises(OSError, match=r"song\.wav cannot be written .*check the free space"):
        write(path, noise)
    assert [p.name for p in small_disk.iterdir()] == ["song.wav"]
    assert path.read_bytes() == b"before"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"song\.wav cannot be written"):
        write(tmp_path / "song.wav", tone(100))


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 251}.wav"
    write(path, tone(100))
    assert path.is_file()


@pytest.mark.parametrize(
    "name, cfg, words",
    [
        ("song.m4a", {}, "song.m4a has no known format; it must end in .wav, .flac, .ogg, .mp3"),
        ("song", {}, "song has no known format"),
        ("song.flac", {"subtype": "FLOAT"}, "FLAC has no floats; set output.subtype to PCM_16 or"),
        (
            "song.mp3",
            {"sample_rate": 96000},
            "MP3 has no 96000 Hz; set output.sample_rate to one",
        ),
        ("song.flac", {"sample_rate": 96001}, "above 65535 Hz, FLAC takes only multiples of 10"),
        ("folder.wav", {}, "folder.wav is a folder; name a file for the converted song"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    name: str, cfg: dict[str, object], words: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.wav").mkdir()
    path = tmp_path / "new" / name if name != "folder.wav" else tmp_path / name
    with pytest.raises(UserError) as caught:
        check_output(path, OutputConfig(**cfg), RATE)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value)
    with pytest.raises(UserError):
        SongFile(path, OutputConfig(**cfg), song(RATE, 10), SOXR, RATE)
    assert not (tmp_path / "new").exists()


def test_the_voice_s_own_rate_is_held_against_the_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MP3 has no 16001 Hz"):
        check_output(tmp_path / "song.mp3", OutputConfig(), 16001)
    check_output(tmp_path / "song.mp3", OutputConfig(sample_rate=16000), 16001)


@pytest.mark.parametrize("rate", [8000, 44100, 65530, 65535, 96000, 192000])
def test_rates_that_are_let_through_can_be_written(rate: int, tmp_path: Path) -> None:
    for suffix in (".wav", ".flac", ".ogg"):
        write(tmp_path / f"song{suffix}", tone(200), cfg=OutputConfig(sample_rate=rate))
        assert sf.info(tmp_path / f"song{suffix}").samplerate == rate
