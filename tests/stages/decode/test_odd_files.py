"""Odd, damaged and cut files: read whole, or left out with a reason, or kept with a note."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from stages.chain import ChainConfig, PreparedSong, StageClock, prepare_song
from stages.decode import DecodeConfig, Decoded, Decoder
from stages.errors import BadInput, Reason
from stages.resample import ResampleConfig

FOLDER = Path(__file__).resolve().parents[2] / "data" / "decode"
CASES: dict[str, dict[str, Any]] = {
    name: case
    for name, case in json.loads((FOLDER / "expected.json").read_text()).items()
    if (FOLDER / name).is_file()
}
# File: the statuses of which one must come out, and the seconds that are kept
HOSTILE = {
    "flac-total1.flac": ("kept with a note", 1.3),
    "wv-3.wv": (Reason.DAMAGED, 0.0),
    "m4a-9.m4a": (Reason.DAMAGED, 0.0),
    "adts-8.aac": (Reason.DAMAGED, 0.0),
    "vorbis-2.ogg": (Reason.DAMAGED, 0.0),
    "ogg-nil-page.ogg": ("kept", 1.3),
    "wav-f32-1e38.wav": (Reason.OUT_OF_RANGE, 0.0),
    "wv-0.wv": ("kept", 1.3),
    "m4a-0.m4a": ("kept", 1.3),
    "adts-0.aac": ("kept", 1.32),
    "vorbis-0.ogg": ("kept", 1.3),
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    with Decoder(DecodeConfig(), tmp_path_factory.mktemp("scratch")) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    with Decoder(DecodeConfig(damaged="keep"), tmp_path_factory.mktemp("keeping")) as decoder:
        yield decoder


def decode(decoder: Decoder, path: Path) -> tuple[np.ndarray[Any, Any], Decoded]:
    """Return the samples at the file's own rate, and all else."""
    rate = decoder.probe(path).sample_rate
    with decoder.decode(path, rate, ResampleConfig()) as decoded:
        return decoded.wav[0 : len(decoded.wav)], decoded


def outcome(decoder: Decoder, path: Path) -> str:
    """Return the status of a file: "kept", "kept with a note", or the reason against it."""
    try:
        _, decoded = decode(decoder, path)
    except BadInput as bad:
        assert bad.detail
        return bad.reason
    return "kept with a note" if decoded.notes else "kept"


def put(folder: Path, data: bytes, name: str) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def prepared(decoder: Decoder, path: Path) -> dict[str, Any]:
    """Return status, reason, detail and seconds of a song, as a ledger has them."""
    try:
        song: PreparedSong = prepare_song(bytes(path), decoder, ChainConfig(), StageClock())
    except BadInput as bad:
        return {"status": "quarantined", "reason": bad.reason, "detail": bad.detail}
    if song.clips:
        return {"status": "kept", "seconds": song.duration_s, "rate": song.header.sample_rate}
    reason, detail = song.why_empty()
    return {"status": "filtered", "reason": reason, "detail": detail}


def agrees(must: dict[str, Any], got: dict[str, Any]) -> bool:
    if must.get("status") != got["status"] or must.get("reason") != got.get("reason"):
        return False
    return "seconds" not in must or abs(must["seconds"] - got["seconds"]) <= 0.1


@pytest.mark.parametrize("name", CASES)
def test_odd_files(name: str, decoder: Decoder) -> None:
    got = prepared(decoder, FOLDER / name)
    assert any(agrees(must, got) for must in CASES[name]["must"]), got


def test_words_for_a_video_without_sound(decoder: Decoder) -> None:
    assert prepared(decoder, FOLDER / "video_without_sound.mkv")["detail"] == (
        "it has no sound, only video"
    )


def test_words_for_channels_that_cancel(decoder: Decoder) -> None:
    detail = prepared(decoder, FOLDER / "stereo_antiphase.wav")["detail"]
    assert "channels cancel each other" in detail


def test_opus_is_decoded_at_48_khz_whatever_its_header_says(decoder: Decoder) -> None:
    wav, decoded = decode(decoder, FOLDER / "opus_noise_header_0.opus")
    assert decoded.header.sample_rate == 48000
    spectrum = np.square(np.abs(np.fft.rfft(wav)))
    frequencies = np.fft.rfftfreq(len(wav), 1 / 48000)
    assert spectrum[(frequencies > 14_000) & (frequencies < 16_000)].mean() > 0.01 * spectrum.mean()


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_files_and_their_originals(name: str, decoder: Decoder) -> None:
    expected, seconds = HOSTILE[name]
    assert outcome(decoder, FOLDER / name) == expected
    if seconds:
        _, decoded = decode(decoder, FOLDER / name)
        assert decoded.source_samples / decoded.header.sample_rate == pytest.approx(
            seconds, abs=0.1
        )


@pytest.mark.parametrize("name", ["wv-3.wv", "m4a-9.m4a", "adts-8.aac", "vorbis-2.ogg"])
def test_damaged_files_can_be_kept(name: str, decoder: Decoder, keeping: Decoder) -> None:
    with pytest.raises(BadInput) as caught:
        decode(decoder, FOLDER / name)
    assert " s" in caught.value.detail  # the second at which the damage is
    wav, decoded = decode(keeping, FOLDER / name)
    (note,) = [note for note in decoded.notes if note.startswith("damaged")]
    assert "decode.damaged is keep" in note
    whole, _ = decode(keeping, FOLDER / f"{name.partition('-')[0]}-0.{name.partition('.')[2]}")
    # What is lost is silent, so that what follows stays in its place.
    if name in ("wv-3.wv", "m4a-9.m4a"):  # the others have no time stamps, or none behind it
        assert abs(len(wav) - len(whole)) <= 2048
        assert np.corrcoef(wav[50_000:57_000], whole[50_000:57_000])[0, 1] > 0.9


# ---- what the kinds have in common --------------------------------------------------------------

WHOLE = [
    *(name for name, case in CASES.items() if case["must"][0]["status"] == "kept"),
    *(name for name, (expected, _) in HOSTILE.items() if expected == "kept"),
]
REFUSED = set(
    "wav_header_too_short.wav wav_24in32_tag1.wav mp3_concat_44_22.mp3 mp3_concat_44_48.mp3".split()
)


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in REFUSED])
def test_a_cut_is_never_silent(name: str, decoder: Decoder, tmp_path: Path) -> None:
    data = (FOLDER / name).read_bytes()
    whole, _ = decode(decoder, FOLDER / name)
    for keep in (len(data) // 2 + 1, len(data) * 3 // 4 + 1, len(data) - 50):
        cut = put(tmp_path, data[:keep], f"cut{Path(name).suffix}")
        if outcome(decoder, cut) == "kept":  # only words, behind the audio, are missing
            np.testing.assert_array_equal(decode(decoder, cut)[0], whole)


# Of these formats every part is under a checksum.
CHECKED = ["wv-0.wv", "vorbis-0.ogg", "mka_opus.mka", "flac_12bit.flac"]


@pytest.mark.parametrize("name", CHECKED)
def test_a_bit_error_is_never_silent(name: str, decoder: Decoder, tmp_path: Path) -> None:
    rng = random.Random(name)
    data = (FOLDER / name).read_bytes()
    for _ in range(12):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data) // 3, len(data) * 4 // 5)] ^= 1 << rng.randrange(8)
        path = put(tmp_path, damaged, f"damaged{Path(name).suffix}")
        assert outcome(decoder, path) in (Reason.DAMAGED, Reason.TRUNCATED, Reason.UNREADABLE)


def lame_mp3(seconds: int = 3) -> bytes:
    """An MP3 with a LAME tag, which has a checksum of the audio."""
    buffer = io.BytesIO()
    wav = 0.3 * np.sin(np.arange(seconds * 44100) / 20)
    sf.write(buffer, wav, 44100, format="MP3")
    return buffer.getvalue()


def test_bit_errors_in_an_mp3_with_a_checksum(decoder: Decoder, tmp_path: Path) -> None:
    data = lame_mp3()
    assert b"LAME" in data[:200]
    assert outcome(decoder, put(tmp_path, data, "whole.mp3")) == "kept"
    rng = random.Random(7)
    for _ in range(12):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data) // 5, len(data) * 4 // 5)] ^= 1 << rng.randrange(8)
        assert outcome(decoder, put(tmp_path, damaged, "damaged.mp3")) != "kept"


def test_a_frame_lost_in_an_mp3_without_a_tag(decoder: Decoder, tmp_path: Path) -> None:
    data = (FOLDER / "adts-0.aac").read_bytes()
    damaged = bytearray(data)
    at = data.index(b"\xff\xf1", len(data) // 2)
    damaged[at + 1] ^= 0x10  # its sync word: FFmpeg skips the frame in silence
    path = put(tmp_path, damaged, "lost.aac")
    assert outcome(decoder, path) != "kept"


TAG = b"ID3\x04\0\0\0\0\x02\0" + bytes(256)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC", "AU", "CAF", "W64", "RF64", "OGG", "MP3"])
def test_a_tag_in_front_changes_nothing(kind: str, decoder: Decoder, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    sf.write(buffer, 0.3 * np.sin(np.arange(44100) / 20), 44100, format=kind)
    plain, _ = decode(decoder, put(tmp_path, buffer.getvalue(), "plain.bin"))
    tagged, decoded = decode(decoder, put(tmp_path, TAG + buffer.getvalue(), "tagged.bin"))
    np.testing.assert_array_equal(tagged, plain)
    assert len(plain) == 44100
    assert not decoded.notes
    cut = put(tmp_path, TAG + buffer.getvalue()[: len(buffer.getvalue()) // 2], "cut.bin")
    assert outcome(decoder, cut) in (Reason.TRUNCATED, Reason.UNREADABLE)


@pytest.mark.parametrize("behind", [b"TAG" + bytes(125), b"APETAGEX" + bytes(60), bytes(999)])
@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC", "AU", "OGG", "MP3"])
def test_a_tag_behind_loses_nothing(
    kind: str, behind: bytes, decoder: Decoder, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    sf.write(buffer, 0.3 * np.sin(np.arange(44100) / 20), 44100, format=kind)
    wav, _ = decode(decoder, put(tmp_path, buffer.getvalue() + behind, "song.bin"))
    assert len(wav) == 44100


# Where the size of the audio stands, from its chunk's name on: offset, format of struct
SIZE_FIELDS = {
    "WAV": (b"data", 4, "<I"),
    "RF64": (b"ds64", 16, "<Q"),
    "W64": (b"data\xf3\xac", 16, "<Q"),
    "AU": (b".snd", 8, ">I"),
    "CAF": (b"data", 4, ">q"),
    "AIFF": (b"COMM", 10, ">I"),
}


@pytest.mark.parametrize("kind", SIZE_FIELDS)
@pytest.mark.parametrize("share", [1 / 3, 0.9])
def test_a_header_of_an_earlier_moment_is_never_silent(
    kind: str, share: float, decoder: Decoder, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    sf.write(buffer, 0.3 * np.sin(np.arange(3 * 44100) / 20), 44100, format=kind)
    data = bytearray(buffer.getvalue())
    name, offset, field = SIZE_FIELDS[kind]
    at = data.index(name) + offset
    size = struct.unpack_from(field, data, at)[0]
    struct.pack_into(field, data, at, int(size * share) // 2 * 2)
    assert outcome(decoder, put(tmp_path, data, "older.bin")) == Reason.TRUNCATED


@pytest.mark.parametrize("of", ["the file", "the RIFF", "the RIFF with its head"])
def test_a_data_size_that_counts_the_header_is_no_cut(
    of: str, decoder: Decoder, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    sf.write(buffer, 0.3 * np.sin(np.arange(44100) / 20), 44100, format="WAV")
    data = bytearray(buffer.getvalue())
    size = {"the file": len(data), "the RIFF": len(data) - 8}.get(of, len(data))
    struct.pack_into("<I", data, 40, size)
    wav, _ = decode(decoder, put(tmp_path, data, "song.wav"))
    assert len(wav) == 44100


@pytest.mark.parametrize(("bits", "align"), [(24, 4), (16, 4), (8, 2), (32, 3)])
def test_a_header_that_contradicts_itself_is_refused(
    bits: int, align: int, decoder: Decoder, tmp_path: Path
) -> None:
    fields = struct.pack("<HHIIHH", 1, 1, 44100, 44100 * align, align, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fields + b"data" + struct.pack("<I", 1200)
    data = b"RIFF" + struct.pack("<I", len(body) + 1200) + body + bytes(range(100)) * 12
    path = put(tmp_path, data, "odd.wav")
    assert outcome(decoder, path) == Reason.UNSUPPORTED


@pytest.mark.parametrize(
    ("kind", "subtype", "code", "damaged"),
    [
        ("CAF", "PCM_16", b"lpcm", b"Lpcm"),
        ("WAV", "MS_ADPCM", b"fmt \x32\0\0\0\2", b"fmt \x32\0\0\0\x22"),
    ],
)
def test_a_file_that_decodes_to_much_more_than_it_states_gets_a_note(
    kind: str, subtype: str, code: bytes, damaged: bytes, decoder: Decoder, tmp_path: Path
) -> None:
    """One bit of the format is wrong, so that the samples are noise of another length."""
    buffer = io.BytesIO()
    sf.write(buffer, 0.3 * np.sin(np.arange(2 * 44100) / 20), 44100, format=kind, subtype=subtype)
    assert code in buffer.getvalue()
    path = put(tmp_path, buffer.getvalue().replace(code, damaged), "odd.bin")
    assert outcome(decoder, path) != "kept"


@pytest.mark.parametrize("subtype", ["MS_ADPCM", "IMA_ADPCM"])
def test_blocks_of_adpcm_of_another_size_are_refused(
    subtype: str, decoder: Decoder, tmp_path: Path
) -> None:
    for channels in (1, 2):
        buffer = io.BytesIO()
        wav = 0.3 * np.sin(np.arange(2 * 44100).reshape(-1, channels) / 20)
        sf.write(buffer, wav, 44100, format="WAV", subtype=subtype)
        data = bytearray(buffer.getvalue())
        assert outcome(decoder, put(tmp_path, data, "whole.wav")) == "kept"
        struct.pack_into("<H", data, 32, 0xFFFF)
        assert outcome(decoder, put(tmp_path, data, "odd.wav")) == Reason.UNSUPPORTED


@pytest.mark.parametrize(
    ("kind", "subtype"), [("AU", "G721_32"), ("WAV", "G721_32"), ("AU", "G723_24")]
)
def test_g721_is_not_read_in_the_wrong_bit_order(
    kind: str, subtype: str, decoder: Decoder, tmp_path: Path
) -> None:
    wav = 0.3 * np.sin(np.arange(44100) / 20)
    path = tmp_path / "song.bin"
    sf.write(path, wav, 44100, format=kind, subtype=subtype)
    got, _ = decode(decoder, path)
    assert np.corrcoef(got[: len(wav)], wav[: len(got)])[0, 1] > 0.99


def test_a_song_larger_than_the_scratch_disk_is_its_own_fault(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Room is checked before an hour of silence is decoded from 42 kB."""
    script = """
        import os
        real = os.statvfs
        def small(path):
            return os.statvfs_result((4096, 4096, 73000, 70000, 70000, 9, 9, 9, 0, 255))
        os.statvfs = small
    """
    (tmp_path / "sitecustomize.py").write_text(
        "\n".join(map(str.strip, script.splitlines())).replace("return", "    return")
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Decoder(DecodeConfig(), tmp_path / "scratch") as small:
        with pytest.raises(BadInput) as caught:
            small.decode(FOLDER / "flac-silence-1h.flac", 44100, ResampleConfig())
        assert caught.value.reason == Reason.NO_ROOM
        assert "635 MB of scratch" in caught.value.detail
        # Resampling from a low rate multiplies, too.
        slow = tmp_path / "slow.wav"
        sf.write(slow, np.zeros(2_000_000, np.int16), 1000)
        with pytest.raises(BadInput) as caught:
            small.decode(slow, 44100, ResampleConfig())
        assert caught.value.reason == Reason.NO_ROOM
        wav, _ = decode(small, FOLDER / "wv-0.wv")
        assert len(wav) == 57330
